"""The table of the kernels' block shapes per architecture, and the device facts that select a row of the table.

tests/kernels check that every entry compiles, fits shared memory and does not spill, on every architecture, with Triton
3.7.1; kernels/README.md has the figures. Which suitable shape is fastest has not been measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from fastdpo.kernels.tuned import tuned_fields


class Blocks(NamedTuple):
    """One launch configuration of a kernel that multiplies (BLOCK_T, BLOCK_H) by (BLOCK_H, BLOCK_V)."""

    block_t: int  # rows
    block_v: int  # vocabulary ids
    block_h: int  # hidden units
    num_warps: int
    num_stages: int
    tma: bool = False  # tiles come through tensor descriptors, where the operands' addresses and strides allow it
    persistent: int = 0  # programs per multiprocessor, which walk the tiles; 0: one program per tile. Sums alone
    library: bool = False  # the matmul library makes the logits, see `library.py`; block_h and num_stages say nothing

    def options(self) -> dict[str, int]:
        """The launch options, except `tma` and `persistent`."""
        blocks = {"BLOCK_T": self.block_t, "BLOCK_V": self.block_v, "BLOCK_H": self.block_h}
        return {**blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}


class Row(NamedTuple):
    """The blocks of one architecture and operand size, by kernel; kernels differ in register use besides the matmul."""

    forward: Blocks  # sums
    forward_options: Blocks  # sums, with a bias, a softcap or statistics
    eager: Blocks  # sums, and the exponentials for the gradient
    eager_options: Blocks
    logit_grads: Blocks  # the gradient, from logits computed once more
    logit_grads_options: Blocks  # the gradient, with a bias or a softcap
    skipping: Blocks  # sums whose tiles backward keeps or drops: small tiles are dropped more often


def _row(blocks: Blocks, **others: Blocks) -> Row:
    """A Row with `blocks` for every kernel that is not named."""
    return Row(*(others.get(name, blocks) for name in Row._fields))


# fp32 is multiplied exactly, without the matrix units
_SMALL = _row(Blocks(64, 64, 16, 8, 2), skipping=Blocks(64, 64, 16, 4, 2))
_AMPERE = _row(Blocks(128, 128, 64, 8, 3))
_HOPPER = _row(
    Blocks(128, 128, 64, 8, 4, tma=True),
    forward=Blocks(128, 256, 64, 8, 4, tma=True),
    eager=Blocks(128, 256, 64, 8, 4, tma=True),
    logit_grads=Blocks(128, 256, 64, 8, 4, tma=True),
    eager_options=Blocks(64, 256, 64, 8, 4, tma=True),
)
_BLACKWELL = _row(
    Blocks(128, 64, 64, 8, 4, tma=True),  # the options: wider tiles spill, and 16 warps do without the matrix unit
    forward=Blocks(128, 256, 64, 8, 4, tma=True),
    eager=Blocks(128, 128, 64, 8, 4, tma=True),
    logit_grads=Blocks(128, 256, 64, 8, 4, tma=True),
    skipping=Blocks(128, 128, 64, 8, 4, tma=True),
)
_WORKSTATION = _row(Blocks(128, 128, 64, 8, 3, tma=True), eager_options=Blocks(64, 128, 64, 8, 3, tma=True))

# Lowest compute capability of a row, then bytes of an operand.
BLOCKS: dict[tuple[int, int], dict[int, Row]] = {
    (8, 0): {2: _AMPERE, 4: _SMALL},
    (8, 6): {2: _AMPERE, 4: _SMALL},
    (8, 9): {2: _AMPERE, 4: _SMALL},
    (9, 0): {2: _HOPPER, 4: _SMALL},
    (10, 0): {2: _BLACKWELL, 4: _SMALL},
    (12, 0): {2: _WORKSTATION, 4: _SMALL._replace(forward_options=_SMALL.skipping)},  # 8 warps spill
}
# Further candidates of the tuner: all compile and fit shared memory, some spill.
CANDIDATES: dict[tuple[int, int], dict[int, tuple[Blocks, ...]]] = {
    (8, 0): {
        2: (
            Blocks(128, 128, 64, 8, 4),
            Blocks(128, 128, 32, 8, 4),
            Blocks(128, 256, 64, 8, 3),
            Blocks(64, 256, 64, 8, 3),
            Blocks(128, 128, 32, 4, 4),
        ),
        4: (Blocks(64, 64, 32, 8, 2), Blocks(128, 64, 16, 8, 2)),
    },
    (8, 6): {
        2: (
            Blocks(128, 128, 32, 8, 3),
            Blocks(128, 128, 32, 4, 4),
            Blocks(128, 256, 32, 8, 3),
            Blocks(64, 256, 32, 8, 4),
        ),
        4: (Blocks(64, 64, 32, 8, 2), Blocks(128, 64, 16, 8, 2)),
    },
    (9, 0): {
        2: (
            # two programs per multiprocessor: one's softmax overlaps the other's matmul, which helps most if H is
            # small; with one program the epilogue is exposed, a third of the time at H = 896
            Blocks(128, 128, 64, 4, 3, tma=True),
            Blocks(128, 128, 64, 8, 3, tma=True),
            Blocks(128, 256, 64, 8, 4, tma=True),
            Blocks(128, 256, 64, 8, 3, tma=True),
            Blocks(128, 256, 64, 8, 3, tma=True, persistent=1),
            Blocks(128, 256, 64, 8, 4, tma=True, persistent=1),
            Blocks(256, 128, 64, 8, 3, tma=True),
            Blocks(256, 128, 64, 8, 3, tma=True, persistent=1),
            Blocks(128, 128, 64, 4, 3, tma=True, persistent=2),
            Blocks(128, 128, 64, 8, 4, tma=True),
            Blocks(64, 256, 64, 8, 4, tma=True),
            Blocks(128, 256, 64, 8, 3),
            Blocks(128, 128, 64, 8, 3),
        ),
        4: (Blocks(64, 64, 32, 8, 2), Blocks(128, 64, 16, 8, 2)),
    },
    (12, 0): {
        2: (
            Blocks(128, 128, 64, 8, 2, tma=True),
            Blocks(128, 128, 32, 8, 4, tma=True),
            Blocks(128, 128, 64, 8, 3),
            Blocks(128, 256, 32, 8, 3, tma=True),
            Blocks(64, 256, 32, 8, 3, tma=True),
            Blocks(128, 128, 64, 4, 3, tma=True),
        ),
        4: (Blocks(64, 64, 32, 8, 2), Blocks(128, 64, 16, 8, 2)),
    },
}
# small, so that tests of ordinary size have ragged tiles in every direction
INTERPRETED, INTERPRETED_LIBRARY = Blocks(32, 64, 64, 1, 1), Blocks(16, 64, 64, 1, 1, library=True)


def blocks_for(capability: tuple[int, int], itemsize: int, kernel: str = "forward") -> Blocks:
    """The blocks from the table's newest row for this compute capability. `kernel` is a field of `Row`."""
    return getattr(BLOCKS[max(c for c in BLOCKS if c <= capability)][itemsize], kernel)


def device_blocks(x: Tensor, kernel: str = "forward") -> Blocks:
    """Blocks of a kernel, a field of `Row`, for operands like `x`, (T, H): the tuned ones if any are in use."""
    fields = tuned_fields(kernel, x)
    if fields is not None:
        return Blocks(**fields)
    capability = capability_of(x)
    return INTERPRETED if capability is None else blocks_for(capability, x.element_size(), kernel)


def candidate_blocks(x: Tensor) -> list[Blocks]:
    """The candidates of the tuner for operands like `x` on its device, including the table's shapes."""
    capability = capability_of(x)
    if capability is None:
        others = (Blocks(32, 64, 64, 1, 1, tma=True, persistent=2), INTERPRETED_LIBRARY)
        return [INTERPRETED, Blocks(16, 32, 32, 1, 1), *others]
    table = BLOCKS[max(c for c in BLOCKS if c <= capability)][x.element_size()]
    return list(dict.fromkeys((*candidates_for(capability, x.element_size()), *table)))


# Folds of what the library multiplied: of fp32 operands, which miss the matrix units here, perhaps 2 to 4 times faster
LIBRARY = (Blocks(16, 256, 64, 4, 1, library=True), Blocks(8, 512, 64, 4, 1, library=True))


def candidates_for(capability: tuple[int, int], itemsize: int) -> tuple[Blocks, ...]:
    return (*CANDIDATES[max(c for c in CANDIDATES if c <= capability)][itemsize], *LIBRARY)


def library_blocks(x: Tensor) -> Blocks:
    """Tiles of the kernels that fold what the library multiplied, for operands like `x`."""
    return INTERPRETED_LIBRARY if capability_of(x) is None else LIBRARY[0]


def num_programs(blocks: Blocks, num_tiles: int, x: Tensor) -> int:
    """Programs that share `num_tiles` tiles on the device of `x`; the interpreter has two multiprocessors."""
    if blocks.persistent == 0:
        return num_tiles
    cores = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2
    return min(num_tiles, cores * blocks.persistent)


FLATTENS_FROM = (10, 0)  # Triton's own reports have flat loops slower on sm_90


def can_flatten(x: Tensor) -> bool:
    """Whether a persistent program's loop over tiles should be merged with its loop over H."""
    return (capability_of(x) or (0, 0)) >= FLATTENS_FROM


_as_if: list[tuple[int, int]] = []  # the capability of a GPU that is not there, the last one counts


def capability_of(x: Tensor) -> tuple[int, int] | None:
    """The compute capability of the GPU of `x`; None in the interpreter."""
    if x.is_cuda:
        return torch.cuda.get_device_capability(x.device)
    return _as_if[-1] if _as_if else None


@contextmanager
def as_if_on(capability: tuple[int, int]) -> Iterator[None]:
    """Launchers in this context choose blocks for a GPU of this capability: to compile without a GPU."""
    _as_if.append(capability)
    try:
        yield
    finally:
        _as_if.pop()


def scratch(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
    """Uninitialized workspace. All buffers except results are allocated here, so that tests can fill them with nan."""
    return torch.empty(shape, dtype=dtype, device=like.device)
