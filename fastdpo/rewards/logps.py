"""Log-probs of every response of a dataset under a model: what rewards and rankings of models are made of.

In: a model by name, folder or object, and data in any form that DPOTrainer takes. Out: one `Scored` per row, in order.
The forward is the trainer's own: packed, prompts shared, full logits never made. Log-probs are kept on disk with those
of references, so that a run that was stopped goes on where it was, and a second one computes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from fastdpo.data.batches.layout import counted_sequences
from fastdpo.data.prepare import Report
from fastdpo.references.rows import read_groups
from fastdpo.training.precompute import precompute_ref_logps
from fastdpo.training.settings.config import DPOConfig

_ROWS_AT_A_TIME = 1000


@dataclass(frozen=True)
class Scored:
    """One row: a prompt with K responses."""

    row: int  # of the dataset, counted from 0; rows that cannot be used are left out
    logps: tuple[float, ...]  # (K,) summed over the counted tokens of each response, nats
    lengths: tuple[int, ...]  # (K,) counted tokens
    preferences: tuple[tuple[int, int], ...]  # (better, worse) responses


@dataclass(frozen=True)
class ScoredData:
    """All rows that could be used, and what became of the others."""

    rows: list[Scored]
    report: Report


def response_logps(
    model: str | nn.Module,
    args: DPOConfig,
    data: Any,
    *,
    name: str = "data",
    processing_class: PreTrainedTokenizerBase | None = None,
    tokenizer_of: str | nn.Module | None = None,
) -> ScoredData:
    """The log-probs of every response under `model`.

    Args:
        args: max_length and its like, bf16, fp16, impl and ref_cache_dir count.
        data: rows in any form, or a prepared dataset.
        tokenizer_of: the model whose tokenizer and chat template are used; by default `model`. Log-probs of two models
            can be compared only where both read the same tokens.
    Raises:
        ValueError: rows that cannot be used, a model that cannot be loaded, or settings that cannot work.
    """
    source = model if tokenizer_of is None else tokenizer_of
    asked = None if source is model else model
    done = precompute_ref_logps(source, args, {name: data}, ref_model=asked, processing_class=processing_class)
    dataset, report = done.datasets[name], done.reports[name]
    dropped = {row for rows in getattr(report, "dropped", {}).values() for row in rows}
    kept = [row for row in range(report.num_rows) if row not in dropped]
    rows: list[Scored] = []
    for start in range(0, len(dataset), _ROWS_AT_A_TIME):
        numbers: Sequence[int] = range(start, min(start + _ROWS_AT_A_TIME, len(dataset)))
        for number, group in zip(numbers, read_groups(dataset, numbers), strict=True):
            lengths = tuple(int(sequence.is_counted.sum()) for sequence in counted_sequences(group))
            assert group.ref_logps is not None
            pairs = tuple((int(better), int(worse)) for better, worse in group.preferences)
            rows.append(Scored(kept[number], tuple(group.ref_logps), lengths, pairs))
    return ScoredData(rows, report)
