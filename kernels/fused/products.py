"""Products of the sparse backward: sums over the kept tiles in a workspace, times W or the hidden states.

In: the workspace of one round, lists of terms from `fastdpo.kernels.rounds`. Out: rows of dH, dW or db. A block of the
result belongs to one program, which sums its terms in fp32 in ascending order: no atomics, the same bits every time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdpo.kernels.launch import capability_of
from fastdpo.kernels.logits import INTERPRETED, can_be_described, describe
from fastdpo.kernels.rounds import Terms
from fastdpo.kernels.tuned import tuned_fields


class ProductBlocks(NamedTuple):
    """One launch configuration of the products: columns of the result, and the part of a tile for one step."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    tma: bool = False  # operands come through tensor descriptors, where their addresses and strides allow it


# Like BLOCKS in launch.py: lowest capability of a row, then bytes of an operand. The first entry is the default and
# does not spill; the others are candidates for `fastdpo.kernels.tuning`. Which is the fastest was not measured.
_FP32 = ((64, 16, 8, 2), (64, 32, 8, 2), (64, 16, 4, 2), (32, 16, 4, 2))
_AMPERE = ((128, 32, 8, 3), (128, 32, 8, 4), (128, 64, 8, 2), (64, 32, 4, 4))
_NARROW = ((128, 64, 8, 4, True), (128, 64, 8, 3, True), (128, 128, 8, 3, True), (128, 64, 8, 4))
_WIDE = ((256, 64, 8, 4, True), (256, 64, 8, 3, True), (256, 64, 8, 4))
_WORKSTATION = ((128, 64, 8, 3, True), (128, 64, 8, 2, True), (128, 32, 8, 4, True), (256, 32, 8, 3, True))
PRODUCT_BLOCKS: dict[tuple[int, int], dict[int, tuple[tuple[Any, ...], ...]]] = {
    (8, 0): {2: _AMPERE, 4: _FP32},
    (9, 0): {2: _WIDE + _NARROW, 4: _FP32},
    (10, 0): {2: _NARROW, 4: _FP32},
    (12, 0): {2: _WORKSTATION, 4: _FP32},
}
_INTERPRETED = ((64, 16, 1, 1), (16, 32, 1, 1), (32, 16, 1, 1, True))
GROUP = 8  # blocks of the result between which a block of the second operand is shared through L2


@triton.jit
def cast(x, dtype: tl.constexpr):
    """x, fp32, rounded to dtype. GPUs do that by themselves; Triton's interpreter cuts digits off for bf16."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit(do_not_specialize=["round_index", "round_stride", "end_stride", "num_out", "num_other"])
def products_kernel(
    out_ptr,  # (num_out, H), contiguous
    tiles_ptr,  # (num_slots, BLOCK_T, BLOCK_V), or with TMA a descriptor of its (num_slots * BLOCK_T, BLOCK_V)
    other_ptr,  # (num_other, H), or with TMA its descriptor
    slots_ptr,  # this and the next three: as in Terms
    blocks_ptr,
    bounds_ptr,
    spans_ptr,
    unit_ptr,  # (1,) fp32, factor of a finished sum
    round_index,
    round_stride,
    end_stride,
    num_out,
    num_other,
    H,
    stride_ob,
    stride_oh,
    TRANSPOSED: tl.constexpr,  # D.T @ other, else D @ other
    FINISH: tl.constexpr,  # writes the sum, else adds to what is there
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
):
    """out[block] (+)= sum over the block's terms of their tile times a block of `other`."""
    BLOCK_M: tl.constexpr = BLOCK_V if TRANSPOSED else BLOCK_T
    DEPTH: tl.constexpr = BLOCK_T if TRANSPOSED else BLOCK_V
    STRIDE_M: tl.constexpr = 1 if TRANSPOSED else BLOCK_V
    STRIDE_K: tl.constexpr = BLOCK_V if TRANSPOSED else 1
    STEPS: tl.constexpr = DEPTH // BLOCK_K
    first_block = tl.load(spans_ptr + 2 * round_index)
    num_blocks = tl.load(spans_ptr + 2 * round_index + 1) - first_block
    num_columns = tl.cdiv(H, BLOCK_N)
    for work in range(tl.program_id(0), num_blocks * num_columns, tl.num_programs(0)):
        group = work // (GROUP * num_columns)
        group_size = min(num_blocks - group * GROUP, GROUP)
        within = work % (GROUP * num_columns)
        block = first_block + group * GROUP + within % group_size
        first_n = (within // group_size) * BLOCK_N
        n = first_n + tl.arange(0, BLOCK_N)
        in_columns = n < H

        bounds = bounds_ptr + round_index * round_stride + block
        first_term, last_term = tl.load(bounds), tl.load(bounds + end_stride)
        if FINISH or last_term > first_term:
            m = tl.arange(0, BLOCK_M)
            rows = block.to(tl.int64) * BLOCK_M + m
            mask = (rows < num_out)[:, None] & in_columns[None, :]
            out_ptrs = out_ptr + rows[:, None] * H + n[None, :]
            if FINISH:
                acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            else:
                acc = tl.load(out_ptrs, mask=mask, other=0.0)
            slot = tl.load(slots_ptr + first_term)
            other_block = tl.load(blocks_ptr + first_term)
            for step in range(first_term * STEPS, last_term * STEPS):
                first_k = (step % STEPS) * BLOCK_K
                tile_slot, first_row = slot, other_block * DEPTH + first_k
                # The next step's place is read one step ahead: the tile's loads would wait for it.
                slot = tl.load(slots_ptr + (step + 1) // STEPS)
                other_block = tl.load(blocks_ptr + (step + 1) // STEPS)
                if TMA:
                    if TRANSPOSED:
                        d = tiles_ptr.load([tile_slot * BLOCK_T + first_k, 0]).T  # (BLOCK_M, BLOCK_K)
                    else:
                        d = tiles_ptr.load([tile_slot * BLOCK_T, first_k])
                    x = other_ptr.load([first_row, first_n])  # (BLOCK_K, BLOCK_N)
                else:
                    k = first_k + tl.arange(0, BLOCK_K)
                    tile_ptr = tiles_ptr + tile_slot.to(tl.int64) * BLOCK_T * BLOCK_V
                    d = tl.load(tile_ptr + m[:, None] * STRIDE_M + k[None, :] * STRIDE_K)
                    row = first_row.to(tl.int64) + tl.arange(0, BLOCK_K)
                    x = tl.load(
                        other_ptr + row[:, None] * stride_ob + n[None, :].to(tl.int64) * stride_oh,
                        mask=(row < num_other)[:, None] & in_columns[None, :],
                        other=0.0,
                    )
                if INTERPRETED:
                    d, x = d.to(tl.float32), x.to(tl.float32)
                acc = tl.dot(d, x, acc, input_precision="ieee")
            if FINISH:
                acc *= tl.load(unit_ptr)
            tl.store(out_ptrs, cast(acc, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["round_index", "round_stride", "end_stride", "num_out"])
def column_sums_kernel(
    out_ptr,  # (num_out,)
    tiles_ptr,  # (num_slots, BLOCK_T, BLOCK_V)
    slots_ptr,  # this and the next two: as in Terms
    bounds_ptr,
    spans_ptr,
    unit_ptr,  # (1,) fp32, factor of the sum
    round_index,
    round_stride,
    end_stride,
    num_out,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """out[block] = sum over the block's terms and over the rows of their tile."""
    first_block, end_block = tl.load(spans_ptr + 2 * round_index), tl.load(spans_ptr + 2 * round_index + 1)
    for block in range(first_block + tl.program_id(0), end_block, tl.num_programs(0)):
        bounds = bounds_ptr + round_index * round_stride + block
        acc = tl.zeros((BLOCK_V,), dtype=tl.float32)
        for term in range(tl.load(bounds), tl.load(bounds + end_stride)):
            tile_ptr = tiles_ptr + tl.load(slots_ptr + term).to(tl.int64) * BLOCK_T * BLOCK_V
            d = tl.load(tile_ptr + tl.arange(0, BLOCK_T)[:, None] * BLOCK_V + tl.arange(0, BLOCK_V)[None, :])
            acc += tl.sum(d.to(tl.float32), axis=0)
        v = block * BLOCK_V + tl.arange(0, BLOCK_V)
        tl.store(out_ptr + v, cast(acc * tl.load(unit_ptr), out_ptr.dtype.element_ty), mask=v < num_out)


def products(
    out: Tensor,  # (num_out, H), contiguous; fp32 unless `finish`
    tiles: Tensor,  # (num_slots, block_t, block_v), the workspace
    other: Tensor,  # (num_other, H), the tiles' dtype
    terms: Terms,
    unit: Tensor,  # (1,) fp32
    transposed: bool,
    finish: bool,
    blocks: ProductBlocks | None = None,
) -> Callable[[int], None]:
    """A function that multiplies the tiles of one round, given its number, while they are in the workspace.

    With `finish` the sums times unit are written, zeros for a block without terms; else they are added to `out`.
    """
    blocks = blocks or product_blocks(tiles, other)
    block_t, block_v = tiles.shape[1:]
    block_k = min(blocks.block_k, block_t if transposed else block_v)
    operands: tuple[Any, Any] = (tiles, other)
    tma = blocks.tma and can_be_described(tiles[0]) and can_be_described(other)
    if tma:
        box = (block_k, block_v) if transposed else (block_t, block_k)
        operands = (describe(tiles.view(-1, block_v), box), describe(other, (block_k, blocks.block_n)))
    grid = (_num_programs(tiles),)

    def multiply(round_index: int) -> None:
        products_kernel[grid](
            out,
            *operands,
            terms.slots,
            terms.blocks,
            terms.bounds,
            terms.spans,
            unit,
            round_index,
            terms.round_stride,
            terms.end_stride,
            out.shape[0],
            *other.shape,
            *other.stride(),
            TRANSPOSED=transposed,
            FINISH=finish,
            BLOCK_T=block_t,
            BLOCK_V=block_v,
            BLOCK_N=blocks.block_n,
            BLOCK_K=block_k,
            GROUP=GROUP,
            TMA=tma,
            num_warps=blocks.num_warps,
            num_stages=blocks.num_stages,
        )

    return multiply


def column_sums(
    out: Tensor,  # (V,)
    tiles: Tensor,  # (num_slots, block_t, block_v)
    terms: Terms,  # of the vocabulary tiles, as the outer side
    unit: Tensor,  # (1,) fp32
) -> Callable[[int], None]:
    """A function that writes one round's column sums by vocabulary tile, times unit; zeros without terms."""

    def add(round_index: int) -> None:
        column_sums_kernel[(_num_programs(tiles),)](
            out,
            tiles,
            terms.slots,
            terms.bounds,
            terms.spans,
            unit,
            round_index,
            terms.round_stride,
            terms.end_stride,
            out.shape[0],
            BLOCK_T=tiles.shape[1],
            BLOCK_V=tiles.shape[2],
            num_warps=8,
        )

    return add


def product_blocks(tiles: Tensor, other: Tensor) -> ProductBlocks:
    """Blocks for these operands on their device: the tuned ones if in use, else the default."""
    fields = tuned_fields("products", other)
    return product_candidates(tiles)[0] if fields is None else ProductBlocks(**fields)


def product_candidates(tiles: Tensor) -> list[ProductBlocks]:
    """The tuner's candidates for a workspace like `tiles`, the default first."""
    capability = capability_of(tiles)
    if capability is None:
        return [ProductBlocks(*x) for x in _INTERPRETED]
    return [ProductBlocks(*x) for x in product_table(capability, tiles.element_size())]


def product_table(capability: tuple[int, int], itemsize: int) -> tuple[tuple[Any, ...], ...]:
    """The newest row of the table for this compute capability."""
    return PRODUCT_BLOCKS[max(c for c in PRODUCT_BLOCKS if c <= capability)][itemsize]


def _num_programs(x: Tensor) -> int:
    """Number of programs of a kernel that strides over its work: as many as the device can run at once."""
    return 2 * torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 3
