"""The outputs of a tile of logits in forward: partial sums per row, and its exponentials if a gradient is needed.

In: the tile in registers. Out: eq. (3), the label's logit, and eq. (13).
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastdpo.kernels.logits import store_tile
from fastdpo.kernels.merge import EXP_FLOOR


@triton.jit
def store_partials(
    z,  # (BLOCK_T, BLOCK_V) fp32
    ratio,  # likewise, u of eq. (2)
    t,  # (BLOCK_T,) int64 rows
    in_rows,  # (BLOCK_T,)
    tile,  # of the vocabulary
    T,
    V,
    labels_ptr,  # and what follows: as in partials_kernel
    label_logit_ptr,
    max_ptr,
    sumexp_ptr,
    sum_z_exp_ptr,
    sum_sq_exp_ptr,
    sum_z_ptr,
    out_ptr,
    row_block,  # of out_ptr
    stride_out,
    HAS_SOFTCAP: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    WITH_SQUARES: tl.constexpr,
    WITH_MEAN: tl.constexpr,
    WITH_GRADS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    v = tile.to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_vocab = v < V
    label = tl.load(labels_ptr + tl.minimum(t, T - 1))  # (BLOCK_T,)
    label_column = label - tile.to(tl.int64) * BLOCK_V
    here = (label_column >= 0) & (label_column < BLOCK_V) & (label < V)
    is_label = tl.arange(0, BLOCK_V)[None, :] == label_column[:, None]
    tl.store(label_logit_ptr + t, tl.sum(tl.where(is_label, z, 0.0), axis=1), mask=in_rows & here)

    if WITH_MEAN:
        sum_z = tl.sum(tl.where(in_vocab[None, :], z, 0.0), axis=1)
    z = tl.where(in_vocab[None, :], z, -float("inf"))
    z_max = tl.max(z, axis=1)
    shifted = z - tl.where(z_max == -float("inf"), 0.0, z_max)[:, None]
    e = tl.exp(shifted)  # (BLOCK_T, BLOCK_V), 0 beyond the vocabulary
    if WITH_GRADS:
        grad = e
        if HAS_SOFTCAP:
            grad *= 1.0 - ratio * ratio
        store_tile(out_ptr, grad, in_rows, row_block, tile, stride_out, BLOCK_T, BLOCK_V)
    partial = tile.to(tl.int64) * T + t
    tl.store(max_ptr + partial, z_max, mask=in_rows)
    tl.store(sumexp_ptr + partial, tl.sum(e, axis=1), mask=in_rows)
    if WITH_ENTROPY:
        tl.store(sum_z_exp_ptr + partial, tl.sum(tl.maximum(shifted, EXP_FLOOR) * e, axis=1), mask=in_rows)
    if WITH_SQUARES:
        tl.store(sum_sq_exp_ptr + partial, tl.sum(e * e, axis=1), mask=in_rows)
    if WITH_MEAN:
        tl.store(sum_z_ptr + partial, sum_z, mask=in_rows)
