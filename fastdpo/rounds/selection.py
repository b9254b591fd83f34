"""Selects pairs from scored responses, and measures how biased their labels are."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

from fastdpo.rewards.intervals import wilson

WAYS = ("best_worst", "best_random", "all", "ranking")


@dataclass(frozen=True)
class Candidates:
    """One prompt with its distinct responses."""

    responses: tuple[str, ...]
    scores: tuple[float, ...]


@dataclass
class Counted:
    """Counts of responses and pairs."""

    num_responses: int = 0
    num_duplicates: int = 0
    num_unscored: int = 0  # responses without a score or without text
    num_ties: int = 0  # dropped pairs: equal scores, or a difference below the margin
    num_prompts_without_pair: int = 0
    num_balanced_away: int = 0
    lengths: list[tuple[int, int]] = field(default_factory=list)  # characters of (chosen, rejected) of the kept pairs

    @property
    def longer_chosen(self) -> tuple[float, tuple[float, float]]:
        """The share of pairs whose chosen response is longer (equal lengths count half), with its interval."""
        longer = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in self.lengths)
        return longer / max(len(self.lengths), 1), wilson(longer, len(self.lengths))


def distinct(responses: Sequence[str], scores: Sequence[float | None], counted: Counted) -> Candidates:
    """The distinct responses with a score. Of equal responses, the first is kept."""
    found: dict[str, float] = {}
    for response, score in zip(responses, scores, strict=True):
        counted.num_responses += 1
        if score is None or not np.isfinite(score) or not response.strip():
            counted.num_unscored += 1
        elif response in found:
            counted.num_duplicates += 1
        else:
            found[response] = float(score)
    return Candidates(tuple(found), tuple(found.values()))


def choose_pairs(
    of: Candidates, way: str, margin: float, rng: random.Random, counted: Counted
) -> list[tuple[int, int]]:
    """(better, worse) responses.

    Args:
        way: best_worst, best_random (the best and a random other one), or all.
        margin: least difference of the scores; 0 only drops ties.
    """
    order = sorted(range(len(of.scores)), key=lambda i: -of.scores[i])
    if len(order) < 2:
        wanted: list[tuple[int, int]] = []
    elif way == "best_worst":
        wanted = [(order[0], order[-1])]
    elif way == "best_random":
        wanted = [(order[0], rng.choice(order[1:]))]
    elif way == "all":
        wanted = list(combinations(order, 2))
    else:
        raise ValueError(f"pairs must be one of {', '.join(WAYS)}, got {way!r}")
    kept = [(a, b) for a, b in wanted if of.scores[a] > of.scores[b] and of.scores[a] - of.scores[b] >= margin]
    counted.num_ties += len(wanted) - len(kept)
    counted.num_prompts_without_pair += not kept
    return kept


def balanced(lengths: Sequence[tuple[int, int]], margins: Sequence[float]) -> list[int]:
    """The pairs to keep so that the longer response is chosen as often as the shorter one. Drops the pairs with the
    smallest margins."""
    longer = [i for i, (a, b) in enumerate(lengths) if a > b]
    shorter = [i for i, (a, b) in enumerate(lengths) if a < b]
    more, fewer = (longer, shorter) if len(longer) > len(shorter) else (shorter, longer)
    gone = set(sorted(more, key=lambda i: margins[i])[: len(more) - len(fewer)])
    return [i for i in range(len(lengths)) if i not in gone]


def length_correlation(lengths: Sequence[float], scores: Sequence[float]) -> float:
    """Pearson's correlation of response length with score; 0 if either does not vary."""
    if len(lengths) < 2 or np.std(lengths) == 0 or np.std(scores) == 0:
        return 0.0
    return float(np.corrcoef(lengths, scores)[0, 1])
