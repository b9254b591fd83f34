"""Counted tokens per chosen response: what a loss that is a mean over tokens has to know before its first batch runs.

In: the batches of an optimizer step, or the rows of an evaluation. Out: the mean over all of them, on all processes.
With it the likelihood terms (sft, orpo, cpo) are sums over pairs: a step can be split, and an evaluation has the same
loss whatever its batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from fastdpo.data.batches.layout import counted_sequences
from fastdpo.losses import LOSSES
from fastdpo.losses.settings import LossConfig
from fastdpo.references.rows import read_groups

_ROWS_AT_A_TIME = 1000


def reads_mean_length(config: LossConfig) -> bool:
    """Whether a loss of `config` is a mean over tokens."""
    return any(LOSSES[name].likelihood for name in config.loss_type)


def mean_length_of_batches(
    parts: Sequence[dict[str, Any]], device: torch.device, reduce: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """(): the mean over collated micro-batches; `reduce` sums (tokens, pairs) over processes, of which some may have
    none: the stream that a process reads ends earlier than another's."""
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    for part in parts:
        counts[0] += part["cu_seqlens"].diff()[part["pairs"][:, 0]].sum().to(device)
        counts[1] += len(part["pairs"])
    if reduce is not None:
        counts = reduce(counts)
    return counts[0] / counts[1].clamp(min=1)


def mean_length_of_dataset(dataset: Dataset) -> float:
    """The mean over all pairs of a prepared dataset."""
    num_tokens = num_pairs = 0
    for start in range(0, len(dataset), _ROWS_AT_A_TIME):
        for group in read_groups(dataset, range(start, min(start + _ROWS_AT_A_TIME, len(dataset)))):
            lengths = [int(sequence.is_counted.sum()) for sequence in counted_sequences(group)]
            num_tokens += sum(lengths[chosen] for chosen, _ in group.preferences)
            num_pairs += len(group.preferences)
    return num_tokens / max(num_pairs, 1)
