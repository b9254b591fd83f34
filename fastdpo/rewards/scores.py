"""Rewards of every response of a dataset, and how often they agree with its preferences.

In: two models and data in any form that DPOTrainer takes. Out: a `RowScores` per row, and a `Summary`. `logps.py`
computes log-probs as the trainer does, so the rewards equal those that the trainer logs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from fastdpo.data.prepare import Report
from fastdpo.rewards.implicit import default_reference
from fastdpo.rewards.intervals import wilson
from fastdpo.rewards.logps import response_logps
from fastdpo.training.settings.config import DPOConfig


@dataclass(frozen=True)
class RowScores:
    """One row with K responses; a line of the output file."""

    row: int  # number of the row in the dataset, from 0
    rewards: tuple[float, ...]  # (K,) beta * (log-prob - the reference's), nats
    logps: tuple[float, ...]  # (K,) under the model, nats
    ref_logps: tuple[float, ...] | None  # (K,)
    lengths: tuple[int, ...]  # (K,) counted tokens
    preferences: tuple[tuple[int, int], ...]  # (better, worse) responses
    margins: tuple[float, ...]  # of each preference: reward of the better minus that of the worse
    best: int  # index of the response with the largest reward


@dataclass(frozen=True)
class Scores:
    """The usable rows, and a report on the others."""

    rows: list[RowScores]
    report: Report
    dataset: Dataset  # prepared: the tokens of `rows`, in order


@dataclass(frozen=True)
class Summary:
    """How often rewards agree with preferences."""

    name: str
    num_pairs: int
    num_right: float  # a tie counts half
    num_ties: int
    mean_margin: float

    @property
    def accuracy(self) -> float:
        return self.num_right / self.num_pairs if self.num_pairs else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval of the accuracy."""
        return wilson(self.num_right, self.num_pairs)


def score(
    model: str | nn.Module,
    reference: str | nn.Module | None,
    data: Any,
    args: DPOConfig,
    *,
    beta: float = 0.1,
    processing_class: PreTrainedTokenizerBase | None = None,
) -> Scores:
    """Rewards of all responses, and a report on the rows.

    Args:
        reference: as in `implicit_reward`: by default an adapter's base model, otherwise none.
        args: tokenization settings such as max_length, precision, packing and ref_cache_dir.
    Raises:
        ValueError: beta is not > 0, no row is usable, or a model cannot be loaded.
    """
    if not beta > 0:
        raise ValueError(f"beta must be > 0, got {beta}")
    ours = response_logps(model, args, data, processing_class=processing_class)
    reference = default_reference(model) if reference is None else reference
    if reference is None:
        return Scores([_row(row, None, beta) for row in ours.rows], ours.report, ours.dataset)
    theirs = response_logps(reference, args, data, processing_class=processing_class, tokenizer_of=model)
    rows = [_row(a, b.logps, beta) for a, b in zip(ours.rows, theirs.rows, strict=True)]
    return Scores(rows, ours.report, ours.dataset)


def _row(scored: Any, ref_logps: tuple[float, ...] | None, beta: float) -> RowScores:
    starts = ref_logps if ref_logps is not None else (0.0,) * len(scored.logps)
    rewards = tuple(beta * (ours - theirs) for ours, theirs in zip(scored.logps, starts, strict=True))
    margins = tuple(rewards[better] - rewards[worse] for better, worse in scored.preferences)
    best = max(range(len(rewards)), key=lambda response: rewards[response])
    return RowScores(scored.row, rewards, scored.logps, ref_logps, scored.lengths, scored.preferences, margins, best)


def summarize(rows: Sequence[RowScores], name: str = "sum over tokens") -> Summary:
    """Accuracy of the rewards over all preferences."""
    return _summary(name, [margin for row in rows for margin in row.margins])


def summarize_per_token(rows: Sequence[RowScores], name: str = "mean per token") -> Summary:
    """As `summarize`, for rewards divided by the number of tokens, so that length itself does not matter."""
    margins = []
    for row in rows:
        means = [reward / max(length, 1) for reward, length in zip(row.rewards, row.lengths, strict=True)]
        margins += [means[better] - means[worse] for better, worse in row.preferences]
    return _summary(name, margins)


def _summary(name: str, margins: Sequence[float]) -> Summary:
    ties = sum(margin == 0 for margin in margins)
    right = sum(margin > 0 for margin in margins) + ties / 2
    mean = sum(margins) / len(margins) if margins else 0.0
    return Summary(name, len(margins), right, ties, mean)
