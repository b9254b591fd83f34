"""Converts targets of other libraries, in which any integer may mark ignored rows, to labels of the head op.

In: class indices of any shape and the index to ignore. Out: int64 labels of the same shape. Refuses probabilities.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdpo.ops.validation import INT_DTYPES
from fastdpo.types import IGNORE_INDEX


def labels_of(target: Tensor, ignore_index: int) -> Tensor:
    """`target` as int64, with IGNORE_INDEX where it is `ignore_index`.

    A target of IGNORE_INDEX that is not the ignore_index becomes -1, so that the op treats it like every other target
    out of range: with ignore_index = 0, [0, -100, 7] becomes [-100, -1, 7].

    Raises:
        ValueError: target does not hold integers.
    """
    if target.dtype not in INT_DTYPES:
        raise ValueError(f"target must hold class indices as integers, not class probabilities, got {target.dtype}")
    labels = target.to(torch.int64)
    if ignore_index == IGNORE_INDEX:
        return labels
    ignored = labels == ignore_index
    return labels.masked_fill(labels == IGNORE_INDEX, -1).masked_fill(ignored, IGNORE_INDEX)
