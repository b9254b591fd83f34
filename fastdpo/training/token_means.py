"""The mean number of counted tokens per chosen response. A loss that is a mean over tokens needs it in advance.

In: the batches of an optimizer step, or the rows of an evaluation. Out: the mean over all of them, on all processes.
With this mean, the likelihood terms (sft, orpo, cpo) become sums over pairs: a step can be split, and the loss of an
evaluation does not depend on its batch size.
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
    """(): the mean over collated micro-batches. `reduce` sums (tokens, pairs) over processes. A process may have no
    micro-batches if its part of a stream ends early."""
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
