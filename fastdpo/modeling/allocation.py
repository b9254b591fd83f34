"""Recognizes errors of memory that has run out, on a GPU or on the CPU. Other errors are somebody else's."""

from __future__ import annotations

import torch


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocation has failed: on a GPU, or on the CPU, whose error has no type of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
