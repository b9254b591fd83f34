"""The part that forward and backward share: one tile of logits, from hidden states and head weight to softcap.

Tiles are loaded through pointers, with any stride, or through tensor descriptors, which the copy engine of sm_90 and
newer GPUs reads in the background: `tile_operands` decides on the host, the constexpr TMA in the kernel. Equation
numbers are those of kernels/README.md.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastdpo.kernels.launch import Blocks
from fastdpo.types import ELSEWHERE, IGNORE_INDEX

IGNORED = tl.constexpr(IGNORE_INDEX)
FOREIGN = tl.constexpr(ELSEWHERE)
# Triton's interpreter stores bf16 as integers and tl.dot would multiply those, so there operands become fp32 first.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


def is_interpreted() -> bool:
    """Whether the kernels were defined to run in Triton's interpreter (TRITON_INTERPRET=1 when they were imported)."""
    return INTERPRETED.value


@triton.jit
def program_tile(program, T, V, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, GROUP_T: tl.constexpr):
    """Row block and vocabulary tile number `program`; GROUP_T row blocks precede the next tile: weights stay in L2."""
    num_row_blocks = tl.cdiv(T, BLOCK_T)
    num_tiles = tl.cdiv(V, BLOCK_V)
    group = program // (GROUP_T * num_tiles)
    group_size = min(num_row_blocks - group * GROUP_T, GROUP_T)
    within = program % (GROUP_T * num_tiles)
    return group * GROUP_T + within % group_size, within // group_size


@triton.jit
def tile_dot(
    acc,  # (BLOCK_T, BLOCK_V) fp32
    hidden_ptr,  # (T, H)
    weight_ptr,  # (V, H)
    t,  # (BLOCK_T,) int64 rows, clamped to T - 1
    v,  # (BLOCK_V,) int64 vocabulary ids, clamped to V - 1
    H,
    stride_ht,
    stride_hh,
    stride_wv,
    stride_wh,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """acc + h @ W.T over the tile, (BLOCK_T, BLOCK_V) fp32."""
    h = tl.arange(0, BLOCK_H).to(tl.int64)
    hidden_ptrs = hidden_ptr + t[:, None] * stride_ht + h[None, :] * stride_hh
    weight_ptrs = weight_ptr + v[None, :] * stride_wv + h[:, None] * stride_wh
    for start in range(0, H, BLOCK_H):
        in_hidden = h < H - start
        x = tl.load(hidden_ptrs, mask=in_hidden[None, :], other=0.0)  # (BLOCK_T, BLOCK_H)
        w = tl.load(weight_ptrs, mask=in_hidden[:, None], other=0.0)  # (BLOCK_H, BLOCK_V)
        if INTERPRETED:
            x, w = x.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        hidden_ptrs += BLOCK_H * stride_hh
        weight_ptrs += BLOCK_H * stride_wh
    return acc


@triton.jit
def described_dot(
    acc,  # (BLOCK_T, BLOCK_V) fp32
    hidden_desc,  # (T, H)
    weight_desc,  # (V, H)
    row_block,
    tile,
    H,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """`tile_dot` through tensor descriptors, which fill ragged edges with zeros."""
    for start in range(0, H, BLOCK_H):
        x = hidden_desc.load([row_block * BLOCK_T, start])  # (BLOCK_T, BLOCK_H)
        w = weight_desc.load([tile * BLOCK_V, start])  # (BLOCK_V, BLOCK_H)
        if INTERPRETED:
            x, w = x.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(x, w.T, acc, input_precision="ieee")
    return acc


@triton.jit
def tile_logits(
    hidden_ptr,  # (T, H), or with TMA its descriptor
    weight_ptr,  # (V, H), likewise
    bias_ptr,  # (V,) or unused
    row_block,
    tile,
    T,
    V,
    H,
    stride_ht,
    stride_hh,
    stride_wv,
    stride_wh,
    logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    TMA: tl.constexpr,
    extra_ptr=None,  # (T, R) of the strides of hidden_ptr, or with TMA its descriptor, or unused
    adapter_ptr=None,  # (V, R) contiguous, likewise
    R=0,
    HAS_ADAPTER: tl.constexpr = False,
):
    """`scale_logits` of the tile: z and u, (BLOCK_T, BLOCK_V) fp32; beyond the edges whatever, but nothing is read."""
    v = tl.minimum(tile.to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V), V - 1)
    t = tl.minimum(row_block.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T), T - 1)
    acc = tl.zeros((BLOCK_T, BLOCK_V), dtype=tl.float32)
    if TMA:
        acc = described_dot(acc, hidden_ptr, weight_ptr, row_block, tile, H, BLOCK_T, BLOCK_V, BLOCK_H)
        if HAS_ADAPTER:
            acc = described_dot(acc, extra_ptr, adapter_ptr, row_block, tile, R, BLOCK_T, BLOCK_V, BLOCK_H)
    else:
        acc = tile_dot(
            acc, hidden_ptr, weight_ptr, t, v, H, stride_ht, stride_hh, stride_wv, stride_wh, BLOCK_T, BLOCK_V, BLOCK_H
        )
        if HAS_ADAPTER:
            acc = tile_dot(acc, extra_ptr, adapter_ptr, t, v, R, stride_ht, stride_hh, R, 1, BLOCK_T, BLOCK_V, BLOCK_H)
    return scale_logits(acc, bias_ptr, v, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP)


def tile_operands(
    hidden_states: Tensor, weight: Tensor, blocks: Blocks, *adapter: Tensor
) -> tuple[tuple[Any, ...], bool]:
    """The arguments hidden_ptr, weight_ptr, with an adapter extra_ptr and adapter_ptr, and TMA of `tile_logits`."""
    factors = (hidden_states, weight, *adapter)
    if not (blocks.tma and all(map(can_be_described, factors))):
        return factors, False
    boxes = ((blocks.block_t, blocks.block_h), (blocks.block_v, blocks.block_h)) * 2
    return tuple(map(describe, factors, boxes)), True


def describe(x: Tensor, box: tuple[int, int]) -> TensorDescriptor:
    """A tensor descriptor of the matrix x; one load reads `box` rows and columns."""
    return TensorDescriptor(x, list(x.shape), [_row_stride(x), 1], list(box))


def can_be_described(x: Tensor) -> bool:
    """Whether a matrix meets the requirements of the copy engine."""
    aligned = x.data_ptr() % 16 == 0 and _row_stride(x) * x.element_size() % 16 == 0
    return aligned and x.stride(1) == 1 and x.shape[0] > 0


def _row_stride(x: Tensor) -> int:
    """The row stride; for a single row, which may have any stride, its length, so that no new kernel is compiled."""
    return x.stride(0) if x.shape[0] > 1 else x.shape[1]


def tile_strides(hidden_states: Tensor, weight: Tensor) -> tuple[int, int, int, int]:
    return _row_stride(hidden_states), hidden_states.stride(1), _row_stride(weight), weight.stride(1)


@triton.jit
def tile_grads(
    z,  # (BLOCK_T, BLOCK_V)
    ratio,  # likewise
    v,  # (BLOCK_V,) ids of the whole vocabulary, as labels have them
    t,  # (BLOCK_T,) rows that exist
    labels_ptr,  # (T,) int64
    lse_whole_ptr,  # (T,) fp32
    lse_rest_ptr,  # (T,) fp32
    row_scale_ptr,  # (T,) fp32
    num_vocab,  # of the whole vocabulary
    HAS_SOFTCAP: tl.constexpr,
):
    """eq. (9) times the row's factor, (BLOCK_T, BLOCK_V) fp32."""
    label = tl.load(labels_ptr + t)  # (BLOCK_T,)
    whole = tl.load(lse_whole_ptr + t)
    is_id = ((label >= 0) & (label < num_vocab)) | (label == FOREIGN)
    whole = tl.where(is_id, whole, float("nan"))  # an error, which must not pass unseen
    whole = tl.where(label == IGNORED, float("inf"), whole)  # exp(z - inf) = 0
    onehot = tl.exp(tl.load(lse_rest_ptr + t))
    grad = tl.exp(z - whole[:, None])
    grad -= tl.where(v[None, :] == label[:, None], onehot[:, None], 0.0)
    if HAS_SOFTCAP:
        grad *= 1.0 - ratio * ratio
    return grad * tl.load(row_scale_ptr + t)[:, None]


@triton.jit
def store_tile(out_ptr, x, in_rows, row_block, tile, stride_out, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr):
    """Writes the rows `in_rows` of x, (BLOCK_T, BLOCK_V), to their place in a (T, V) tensor of row stride `stride_out`.

    What x holds beyond the vocabulary goes into the padding at the end of each row, so that a padded row of an uneven
    vocabulary is stored in words as wide as any other.
    """
    # 32-bit offsets inside the tile: 64-bit ones fill the registers
    column = tl.arange(0, BLOCK_V)
    first = out_ptr + row_block.to(tl.int64) * BLOCK_T * stride_out + tile * BLOCK_V
    offsets = tl.arange(0, BLOCK_T)[:, None] * stride_out + column[None, :]
    mask = in_rows[:, None] & (tile * BLOCK_V + column < stride_out)[None, :]
    tl.store(first + offsets, x.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def tanh(x):
    """tanh to a rounding error of fp32, from exp alone; near 0, where that cancels, Lambert's continued fraction."""
    sq = x * x
    near = sq < 0.36  # there the fraction is off by less than 1e-9
    e = tl.exp(-2.0 * tl.abs(x))
    over = tl.where(near, x * (945.0 + sq * (105.0 + sq)), tl.where(x < 0.0, e - 1.0, 1.0 - e))
    under = tl.where(near, 945.0 + sq * (420.0 + sq * 15.0), 1.0 + e)
    return over / under


@triton.jit
def scale_logits(acc, bias_ptr, v, logit_scale, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """eq. (1) and (2): z from h @ W.T, and t = z / softcap (z itself without softcap), both (BLOCK_T, BLOCK_V) fp32."""
    if HAS_BIAS:
        acc += tl.load(bias_ptr + v).to(tl.float32)[None, :]
    z = acc * logit_scale
    ratio = z
    if HAS_SOFTCAP:
        ratio = tanh(z / softcap)
        z = ratio * softcap
    return z, ratio
