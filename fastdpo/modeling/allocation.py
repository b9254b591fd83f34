"""Recognizes errors of memory that has run out, on a GPU or on the CPU. Other errors are somebody else's."""

from __future__ import annotations

import torch

# of errors without a type of their own: of the CPU; of the driver, also through Triton; of cuBLAS, cuDNN and hipBLAS
_WORDS = ("can't allocate memory", "out of memory", "STATUS_ALLOC_FAILED")


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocation has failed: in torch's allocator on a GPU, in a library beside it, or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in _WORDS)
