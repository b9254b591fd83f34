"""Ranks models on preference pairs by the responses that each model prefers: one packed forward per model.

In: two or more models, or the checkpoints of a run, and preference data in any form that DPOTrainer takes. Out: the
share of pairs that each model orders as labelled, and Bradley-Terry strengths of all models. Refused with ValueError:
fewer than two models, a measure that needs a reference without one, data without usable pairs.

**What a model prefers.** A model prefers the response of a pair with the larger score. The score is (`by`)
- `sum`: the log-prob of the response, summed over its counted tokens;
- `mean`: the same divided by the number of these tokens;
- `reference`: the summed log-prob minus the reference's, which is DPO's implicit reward divided by beta.
A model is right about a pair if it prefers the chosen response. Scores that differ by less than rounding are a tie,
which counts as half right.

**Who wins.** Every two models are compared on every pair. With `wins`
- `right`, a model wins if it is right and the other one is wrong, or if only one of them has a tie and it does better;
- `margin`, the model with the larger margin wins: the score of the chosen response minus that of the rejected one.
Otherwise it is a tie. Comparisons of one prompt are one cluster. `margin` needs fewer pairs, but favours models with
extreme log-probs; less so by `mean` or `reference` than by `sum`.

Each model uses its own tokenizer and chat template, unless one tokenizer is given for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedTokenizerBase

from fastdpo.data.sources.cache import tokenizer_state
from fastdpo.ranking.bradley_terry import Strengths, fit_bradley_terry
from fastdpo.ranking.comparisons import Comparisons
from fastdpo.ranking.shares import Share, share_of
from fastdpo.rewards.logps import ScoredData, response_logps
from fastdpo.training.settings.checks import check_choice
from fastdpo.training.settings.config import DPOConfig
from fastdpo.training.setup.models import resolve_tokenizer

MEASURES = ("sum", "mean", "reference")
WINS = ("right", "margin")
_ROUNDING = 1e-6  # of log-probs in fp32
_Pair = tuple[int, int, int]  # row, better response, worse response


@dataclass(frozen=True)
class RankedModels:
    """The result, with models in the given order."""

    models: tuple[str, ...]
    accuracies: dict[str, list[Share]]  # measure -> one for each model
    longer: list[Share | None]  # share of pairs of unequal lengths in which the model prefers the longer one, by `by`
    comparisons: Comparisons
    strengths: Strengths | None
    no_strengths: str  # the reason why there are no strengths; empty if there are
    num_pairs: int
    num_prompts: int
    reports: dict[str, ScoredData]  # model -> its log-probs, and a report on the rows
    num_not_shared: int  # left-out pairs, which not every model could read
    by: str
    wins: str


@dataclass(frozen=True)
class _Sides:
    """The numbers of P pairs under one model, better response first."""

    logps: NDArray[np.float64]  # (P, 2)
    lengths: NDArray[np.float64]  # (P, 2)
    reference: NDArray[np.float64] | None  # (P, 2)

    def margins(self, measure: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(P,) score of better minus worse, and (P,) its possible rounding error."""
        scores, sizes = self.logps, np.abs(self.logps)
        if measure == "mean":
            scores, sizes = scores / self.lengths, sizes / self.lengths
        elif measure == "reference":
            assert self.reference is not None
            scores, sizes = scores - self.reference, sizes + np.abs(self.reference)
        return scores[:, 0] - scores[:, 1], _ROUNDING * sizes.sum(1)


def rank_models(
    models: Sequence[str] | Mapping[str, str | nn.Module],
    args: DPOConfig,
    data: Any,
    *,
    reference: str | nn.Module | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    by: str = "sum",
    wins: str = "right",
    confidence: float = 0.95,
    on_model: Callable[[str], None] = lambda name: None,
) -> RankedModels:
    """Ranks models on preference pairs. The module's docstring defines the comparison.

    Args:
        models: names or folders, also of adapters; or a dict of names to models.
        args: the settings that matter are those of `response_logps`: tokenization, bf16, fp16, impl, ref_cache_dir.
        data: rows in any form.
        reference: the model for the measure `reference`.
        processing_class: one tokenizer for all models; by default each model uses its own.
        by: the measure by which models are compared. Accuracies are computed by all measures.
        wins: "right" or "margin".
        confidence: of all intervals.
        on_model: called with the name of each model before it runs.
    Raises:
        ValueError: see the module's docstring.
    """
    named = dict(models) if isinstance(models, Mapping) else {model: model for model in models}
    if len(named) < 2 or len(named) < len(models):
        raise ValueError(f"models must be at least two different ones, got {list(models)}")
    check_choice("by", by, MEASURES)
    check_choice("wins", wins, WINS)
    if by == "reference" and reference is None:
        raise ValueError("by must be 'sum' or 'mean' without a reference, got 'reference'; set reference to a model")
    tokenizers = {name: resolve_tokenizer(model, processing_class, args) for name, model in named.items()}
    of_reference: dict[str, ScoredData] = {}
    if reference is not None:
        asked: dict[Any, ScoredData] = {}
        for name, tokenizer in tokenizers.items():
            state = repr(tokenizer_state(tokenizer))
            if state not in asked:
                on_model("reference")
                asked[state] = response_logps(reference, args, data, processing_class=tokenizer)
            of_reference[name] = asked[state]
    scored: dict[str, ScoredData] = {}
    for name, model in named.items():
        on_model(name)
        scored[name] = response_logps(model, args, data, processing_class=tokenizers[name])
    pairs, num_all = _shared_pairs(scored.values())
    sides = [_sides(scored[name], of_reference.get(name), pairs) for name in named]
    return _ranked(list(named), scored, sides, pairs, num_all, by, wins, confidence)


def accuracy_record(ranked: RankedModels, model: str) -> dict[str, Any]:
    """Keys for the model's record in a file: accuracy_sum, accuracy_sum_lower, accuracy_sum_upper, the same for the
    other measures and for `prefers_longer`, and num_pairs."""
    index = ranked.models.index(model)
    shares: dict[str, Share | None] = {f"accuracy_{name}": of[index] for name, of in ranked.accuracies.items()}
    record: dict[str, Any] = {}
    for name, share in {**shares, "prefers_longer": ranked.longer[index]}.items():
        ends = (None, None, None) if share is None else (share.rate, share.lower, share.upper)
        record |= dict(zip((name, f"{name}_lower", f"{name}_upper"), ends, strict=True))
    return record | {"num_pairs": ranked.num_pairs}


def _shared_pairs(scored: Any) -> tuple[list[tuple[_Pair, bytes]], int]:
    """The pairs that all models could read, each with its prompt, and the number of pairs that any model could read."""
    pairs: list[dict[_Pair, bytes]] = []
    for data in scored:
        of_model: dict[_Pair, bytes] = {}
        for row in data.rows:
            prompt = row.prompt or b"row %d" % row.row
            of_model.update({(row.row, better, worse): prompt for better, worse in row.preferences})
        pairs.append(of_model)
    shared = [(pair, prompt) for pair, prompt in pairs[0].items() if all(pair in other for other in pairs[1:])]
    if not shared:
        raise ValueError("data must hold at least one pair that all models can read, got none")
    return shared, len(set().union(*pairs))


def _sides(scored: ScoredData, reference: ScoredData | None, pairs: Sequence[tuple[_Pair, bytes]]) -> _Sides:
    def column(data: ScoredData, name: str) -> NDArray[np.float64]:
        rows = {row.row: getattr(row, name) for row in data.rows}
        return np.array([(rows[row][better], rows[row][worse]) for (row, better, worse), _ in pairs], float)

    of_reference = None if reference is None else column(reference, "logps")
    return _Sides(column(scored, "logps"), column(scored, "lengths"), of_reference)


def _ranked(
    models: list[str],
    reports: dict[str, ScoredData],
    sides: list[_Sides],
    pairs: Sequence[tuple[_Pair, bytes]],
    num_all: int,
    by: str,
    wins: str,
    confidence: float,
) -> RankedModels:
    _, prompts = np.unique(np.array([prompt.hex() for _, prompt in pairs]), return_inverse=True)
    measures = MEASURES if sides[0].reference is not None else MEASURES[:2]
    points = {measure: [_signs(*side.margins(measure)) / 2 + 0.5 for side in sides] for measure in measures}
    accuracies = {
        measure: [share_of(of_model, prompts, confidence) for of_model in of_measure]
        for measure, of_measure in points.items()
    }
    longer = [_prefers_longer(side, right, prompts, confidence) for side, right in zip(sides, points[by], strict=True)]
    comparisons = _compared(models, sides, points[by], prompts, by, wins)
    strengths, why = None, ""
    try:
        strengths = fit_bradley_terry(comparisons)
    except ValueError as error:
        why = str(error)
    return RankedModels(
        tuple(models),
        accuracies,
        longer,
        comparisons,
        strengths,
        why,
        len(pairs),
        int(prompts.max()) + 1,
        reports,
        num_all - len(pairs),
        by,
        wins,
    )


def _signs(margins: NDArray[np.float64], rounding: NDArray[np.float64]) -> NDArray[np.float64]:
    """The signs of the margins, 0 for margins within the rounding error."""
    return np.where(np.abs(margins) <= rounding, 0.0, np.sign(margins))


def _compared(
    models: list[str],
    sides: list[_Sides],
    points: list[NDArray[np.float64]],
    prompts: NDArray[np.int64],
    by: str,
    wins: str,
) -> Comparisons:
    """Every pair of models on every preference pair."""
    first, second = np.triu_indices(len(models), 1)
    outcomes = []
    for one, other in zip(first, second, strict=True):
        if wins == "right":
            signs = np.sign(points[one] - points[other])
        else:
            (margins, rounding), (others, of_others) = sides[one].margins(by), sides[other].margins(by)
            signs = _signs(margins - others, rounding + of_others)
        outcomes.append(0.5 + signs / 2)
    num_pairs = len(prompts)
    return Comparisons(
        tuple(models),
        np.repeat(first, num_pairs),
        np.repeat(second, num_pairs),
        np.concatenate(outcomes),
        np.tile(prompts, len(first)),
    )


def _prefers_longer(
    side: _Sides, right: NDArray[np.float64], prompts: NDArray[np.int64], confidence: float
) -> Share | None:
    difference = side.lengths[:, 0] - side.lengths[:, 1]
    rows = difference != 0
    if not rows.any():
        return None
    return share_of(np.where(difference > 0, right, 1 - right)[rows], prompts[rows], confidence)
