"""Backward of the head op: one tile of the logits' gradient, recomputed from hidden states, head weight and lse.

In: the inputs of forward, its lse, and the row factors c of eq. (10). Out: c times
`(softmax(z) - onehot) * exp(lse_rest) * dz/dy`, eq. (9), over a row block times a vocabulary block, in a bounded
workspace and the operands' dtype; `fastdpo.ops.gradients` multiplies it. c is a factor of the tile because a scaled
copy of the hidden states would be as large as the hidden states.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdpo.kernels.launch import Blocks, device_blocks
from fastdpo.kernels.library import library_grads
from fastdpo.kernels.logits import program_tile, store_tile, tile_grads, tile_logits, tile_operands, tile_strides


@triton.jit(
    do_not_specialize=["T", "first_vocab"],  # nor compiled anew for each of their values
    # slices, which start anywhere
    do_not_specialize_on_alignment=["bias_ptr", "labels_ptr", "lse_whole_ptr", "lse_rest_ptr", "row_scale_ptr"],
)
def logit_grads_kernel(
    out_ptr,  # (T, V)
    hidden_ptr,  # (T, H), or with TMA its descriptor
    weight_ptr,  # (V, H), likewise
    bias_ptr,  # (V,) or unused
    labels_ptr,  # (T,) int64, ids of the whole vocabulary
    lse_whole_ptr,  # (T,) fp32
    lse_rest_ptr,  # (T,) fp32
    row_scale_ptr,  # (T,) fp32, c in eq. (10)
    T,  # rows of this block
    V,  # vocabulary ids of this block
    H,
    first_vocab,  # id of column 0
    num_vocab,  # of the whole vocabulary
    stride_ht,
    stride_hh,
    stride_wv,
    stride_wh,
    stride_out,
    logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP_T: tl.constexpr,
    TMA: tl.constexpr,
):
    row_block, tile = program_tile(tl.program_id(0), T, V, BLOCK_T, BLOCK_V, GROUP_T)

    t = row_block.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    v = tile.to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    t_safe = tl.minimum(t, T - 1)
    z, ratio = tile_logits(
        hidden_ptr,
        weight_ptr,
        bias_ptr,
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
        HAS_BIAS,
        HAS_SOFTCAP,
        BLOCK_T,
        BLOCK_V,
        BLOCK_H,
        TMA,
    )

    grad = tile_grads(
        z,
        ratio,
        first_vocab + v,
        t_safe,
        labels_ptr,
        lse_whole_ptr,
        lse_rest_ptr,
        row_scale_ptr,
        num_vocab,
        HAS_SOFTCAP,
    )
    store_tile(out_ptr, grad, t < T, row_block, tile, stride_out, BLOCK_T, BLOCK_V)


def fill_logit_grads(
    out: Tensor,  # (block_rows, block_vocab) of row stride >= block_vocab; the padding is filled with anything
    hidden_states: Tensor,  # (block_rows, H)
    weight: Tensor,  # (block_vocab, H)
    bias: Tensor | None,  # (block_vocab,)
    labels: Tensor,  # (block_rows,) int64
    lse_whole: Tensor,  # (block_rows,) fp32
    lse_rest: Tensor,  # (block_rows,) fp32
    row_scale: Tensor,  # (block_rows,) fp32
    first_vocab: int,
    num_vocab: int,
    logit_scale: float,
    softcap: float | None,
    blocks: Blocks | None = None,
) -> None:
    options = bias is not None or softcap is not None
    blocks = blocks or device_blocks(hidden_states, "logit_grads_options" if options else "logit_grads")
    if blocks.library:
        rows = (labels, lse_whole, lse_rest, row_scale)
        head = (first_vocab, num_vocab, logit_scale, softcap)
        return library_grads(out, hidden_states, weight, bias, *rows, *head, blocks)
    operands, tma = tile_operands(hidden_states, weight, blocks)
    logit_grads_kernel[(triton.cdiv(out.shape[0], blocks.block_t) * triton.cdiv(out.shape[1], blocks.block_v),)](
        out,
        *operands,
        labels if bias is None else bias,
        labels,
        lse_whole,
        lse_rest,
        row_scale,
        *out.shape,
        hidden_states.shape[1],
        first_vocab,
        num_vocab,
        *tile_strides(hidden_states, weight),
        out.stride(0),
        float(logit_scale),
        1.0 if softcap is None else float(softcap),
        HAS_BIAS=bias is not None,
        HAS_SOFTCAP=softcap is not None,
        GROUP_T=8,
        TMA=tma,
        **blocks.options(),
    )


def power_of_two(row_scale: Tensor) -> Tensor:
    """(1,): the power of two just below the largest finite factor, 1 if all are zero."""
    largest = row_scale.abs().nan_to_num(0.0, 0.0, 0.0).amax(0, keepdim=True)
    return torch.where(largest > 0, largest.log2().floor().exp2(), 1.0)
