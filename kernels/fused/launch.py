"""Block shapes of the kernels per architecture, in one table, and the few facts about the device that pick a row of it.

Each shape is (BLOCK_T rows, BLOCK_V vocabulary, BLOCK_H hidden, num_warps, num_stages).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Blocks(NamedTuple):
    """One launch configuration of a kernel that multiplies (BLOCK_T, BLOCK_H) by (BLOCK_H, BLOCK_V)."""

    block_t: int
    block_v: int
    block_h: int
    num_warps: int
    num_stages: int


# Compute capability from which a row holds, and its blocks for 2-byte and 4-byte operands. fp32 is multiplied exactly,
# without the matrix units, so its blocks are small. tests/kernels holds every entry to fitting without spilling.
BLOCKS: dict[tuple[int, int], dict[int, Blocks]] = {
    (8, 0): {2: Blocks(128, 128, 32, 8, 3), 4: Blocks(64, 64, 16, 8, 2)},
    (8, 6): {2: Blocks(128, 128, 32, 8, 3), 4: Blocks(64, 64, 16, 8, 2)},
    (9, 0): {2: Blocks(128, 128, 64, 8, 3), 4: Blocks(64, 64, 16, 8, 2)},
    (10, 0): {2: Blocks(128, 128, 64, 8, 3), 4: Blocks(64, 64, 16, 8, 2)},
    (12, 0): {2: Blocks(128, 128, 32, 8, 3), 4: Blocks(64, 64, 16, 8, 2)},
}
INTERPRETED = Blocks(32, 64, 64, 1, 1)  # small, so that tests of ordinary size have ragged tiles in every direction


def blocks_for(capability: tuple[int, int], itemsize: int) -> Blocks:
    """The newest row of the table that this compute capability reaches."""
    return BLOCKS[max(c for c in BLOCKS if c <= capability)][itemsize]


def device_blocks(x: Tensor) -> Blocks:
    """Blocks for operands like `x` on the device where it is."""
    if not x.is_cuda:
        return INTERPRETED
    return blocks_for(torch.cuda.get_device_capability(x.device), x.element_size())


def is_interpreted() -> bool:
    """Whether the kernels were defined to run in Triton's interpreter (TRITON_INTERPRET=1 when they were imported)."""
    from fastdpo.kernels.logits import INTERPRETED

    return INTERPRETED.value


def scratch(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
    """Uninitialized workspace. Buffers that are not results come from here, so that tests can fill them with nan."""
    return torch.empty(shape, dtype=dtype, device=like.device)
