"""Log-probs of every response of a dataset under a model, the basis of rewards and of model rankings.

In: a model by name, folder or object, and data in any form that DPOTrainer takes. Out: one `Scored` per row, in order.
The forward is the trainer's: packed, with shared prompts and without full logits. Log-probs are stored in the cache of
references, so that a stopped run continues where it stopped, and a second run computes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from fastdpo.data.batches.layout import counted_sequences
from fastdpo.data.prepare import Report
from fastdpo.references.cache import sequence_key
from fastdpo.references.rows import read_groups
from fastdpo.training.precompute import precompute_ref_logps
from fastdpo.training.settings.config import DPOConfig

_ROWS_AT_A_TIME = 1000


@dataclass(frozen=True)
class Scored:
    """One row: a prompt with K responses."""

    row: int  # number of the row in the dataset, from 0; unusable rows are left out
    logps: tuple[float, ...]  # (K,) summed over the counted tokens of each response, nats
    lengths: tuple[int, ...]  # (K,) counted tokens
    preferences: tuple[tuple[int, int], ...]  # (better, worse) responses
    prompt: bytes = b""  # equal for rows with the same prompt; empty if each response has its own prompt


@dataclass(frozen=True)
class ScoredData:
    """All usable rows, and a report on the others."""

    rows: list[Scored]
    report: Report
    dataset: Dataset  # prepared: the tokens of `rows`, in order


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
        args: the settings that matter are those of tokenization (such as max_length), bf16, fp16, impl, ref_cache_dir.
        data: rows in any form, or a prepared dataset. The columns ref_chosen_logps and ref_rejected_logps are not used,
            because they come from another model.
        tokenizer_of: the model whose tokenizer and chat template are used; by default `model`. Log-probs of two models
            are comparable only if both read the same tokens.
    Raises:
        ValueError: rows are unusable, a model cannot be loaded, or settings cannot work.
    """
    source = model if tokenizer_of is None else tokenizer_of
    done = precompute_ref_logps(
        source,
        args,
        {name: data},
        ref_model=None if source is model else model,
        processing_class=processing_class,
        takes_brought=False,
        what=f"Log-probs under {model}" if isinstance(model, str) else "Log-probs",
    )
    dataset, report = done.datasets[name], done.reports[name]
    dropped = {row for rows in getattr(report, "dropped", {}).values() for row in rows}
    kept = [row for row in range(report.num_rows) if row not in dropped]
    rows: list[Scored] = []
    for start in range(0, len(dataset), _ROWS_AT_A_TIME):
        numbers: Sequence[int] = range(start, min(start + _ROWS_AT_A_TIME, len(dataset)))
        for number, group in zip(numbers, read_groups(dataset, numbers), strict=True):
            lengths = tuple(int(sequence.is_counted.sum()) for sequence in counted_sequences(group))
            assert group.ref_logps is not None
            prompt = np.asarray(group.prompt_ids)
            key = sequence_key(prompt, np.zeros(len(prompt), bool)) if len(prompt) else b""
            pairs = tuple((int(better), int(worse)) for better, worse in group.preferences)
            rows.append(Scored(kept[number], tuple(group.ref_logps), lengths, pairs, key))
    return ScoredData(rows, report, dataset)
