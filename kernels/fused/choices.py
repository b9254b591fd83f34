"""Several labels per row, and the gradients of lse and entropy, from blocks of logits that the matmul library makes.

In: the inputs of `forward.py` and `backward.py`, with labels (T, K). Out: the chosen logits beside the statistics of
`forward.py`, and eq. (22) over a row block times a vocabulary block. Each label is looked up in the fp32 logits that
gave the sums, so that it costs one number, and a row's log-probs and its lse come from the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdpo.kernels.forward import fused_forward
from fastdpo.kernels.launch import Blocks, library_blocks
from fastdpo.kernels.library import logit_blocks, read_logits, writable_columns
from fastdpo.kernels.logits import IGNORED, scale_logits
from fastdpo.kernels.merge import EXP_FLOOR

LABELS = 64  # of a row that a program takes at once


@triton.jit
def read_labels(
    logits_ptr,  # (T, V) fp32, a block
    bias_ptr,  # (V,) of the block's ids, or unused
    labels_ptr,  # (T, K) int64
    t,
    k,  # (BLOCK,)
    K,
    V,
    first_vocab,
    stride_logits,
    logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """The labels and their columns in the block, (BLOCK,); which lie in it; `scale_logits` of these, (1, BLOCK)."""
    label = tl.load(labels_ptr + t * K + k, mask=k < K, other=IGNORED)
    column = label - first_vocab
    here = (column >= 0) & (column < V)
    acc = tl.load(logits_ptr + t * stride_logits + column[None, :], mask=here[None, :], other=0.0)
    column = tl.where(here, column, 0)
    z, ratio = scale_logits(acc, bias_ptr, column, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP)
    return label, column, here, z, ratio


@triton.jit
def choice_grads(
    z,  # fp32, and so are the next five, of shapes that broadcast
    ratio,
    lse_whole,
    lse_rest,
    offset,
    slope,
    chosen,  # sum_k g_tk [v = y_tk]
    logit_scale,
    HAS_SOFTCAP: tl.constexpr,
):
    """eq. (22), with offset = sum_k g_tk - l_t + e_t E_t and slope = e_t."""
    log_p = (z - lse_whole) - lse_rest
    grad = chosen - tl.exp(log_p) * (tl.maximum(log_p, EXP_FLOOR) * slope + offset)
    if HAS_SOFTCAP:
        grad *= 1.0 - ratio * ratio
    return grad * logit_scale


@triton.jit(
    do_not_specialize=["K", "V", "first_vocab"],
    do_not_specialize_on_alignment=["chosen_ptr", "bias_ptr", "labels_ptr"],
)
def choice_logits_kernel(
    chosen_ptr,  # (T, K) fp32; only labels that lie in the block are written
    logits_ptr,  # and what follows: as in read_labels
    bias_ptr,
    labels_ptr,
    K,
    V,
    first_vocab,
    stride_logits,
    logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    _, _, here, z, _ = read_labels(
        logits_ptr,
        bias_ptr,
        labels_ptr,
        t,
        k,
        K,
        V,
        first_vocab,
        stride_logits,
        logit_scale,
        softcap,
        HAS_BIAS,
        HAS_SOFTCAP,
    )
    tl.store(chosen_ptr + t * K + k[None, :], z, mask=here[None, :])


@triton.jit(
    do_not_specialize=["T", "V", "width"],
    do_not_specialize_on_alignment=[
        *("out_ptr", "bias_ptr", "lse_whole_ptr", "lse_rest_ptr", "offset_ptr", "slope_ptr")
    ],
)
def choice_grads_kernel(
    out_ptr,  # (T, V), a block
    logits_ptr,  # (T, V) fp32, the same block
    bias_ptr,  # (V,) or unused
    lse_whole_ptr,  # (T,) fp32, inf in ignored rows, and so are the next three
    lse_rest_ptr,
    offset_ptr,
    slope_ptr,
    T,
    V,
    width,  # columns of out that may be written, padding included
    stride_logits,
    stride_out,
    logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """eq. (22) for one tile, as if no label were in it."""
    num_tiles = tl.cdiv(V, BLOCK_V)
    row_block, tile = tl.program_id(0) // num_tiles, tl.program_id(0) % num_tiles
    t = row_block.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    v = tile.to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    z, ratio = read_logits(logits_ptr, bias_ptr, t, v, T, V, stride_logits, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP)
    in_rows = t < T
    whole = tl.load(lse_whole_ptr + t, mask=in_rows, other=0.0)[:, None]
    rest = tl.load(lse_rest_ptr + t, mask=in_rows, other=0.0)[:, None]
    offset = tl.load(offset_ptr + t, mask=in_rows, other=0.0)[:, None]
    slope = tl.load(slope_ptr + t, mask=in_rows, other=0.0)[:, None]
    grad = choice_grads(z, ratio, whole, rest, offset, slope, 0.0, logit_scale, HAS_SOFTCAP)
    mask = in_rows[:, None] & (v < width)[None, :]
    tl.store(out_ptr + t[:, None] * stride_out + v[None, :], grad.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=["K", "V", "first_vocab"],
    do_not_specialize_on_alignment=[
        *("out_ptr", "bias_ptr", "labels_ptr", "grads_ptr"),
        *("lse_whole_ptr", "lse_rest_ptr", "offset_ptr", "slope_ptr"),
    ],
)
def choice_labels_kernel(
    out_ptr,  # (T, V), a block
    logits_ptr,  # and the next two: as in read_labels
    bias_ptr,
    labels_ptr,
    grads_ptr,  # (T, K) fp32, g
    lse_whole_ptr,  # (T,) fp32, and so are the next three
    lse_rest_ptr,
    offset_ptr,
    slope_ptr,
    K,
    V,
    first_vocab,
    stride_logits,
    stride_out,
    logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """eq. (22) at the labels. Labels of one id write the same number."""
    t = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    label, column, here, z, ratio = read_labels(
        logits_ptr,
        bias_ptr,
        labels_ptr,
        t,
        k,
        K,
        V,
        first_vocab,
        stride_logits,
        logit_scale,
        softcap,
        HAS_BIAS,
        HAS_SOFTCAP,
    )
    chosen = tl.zeros((BLOCK,), tl.float32)
    for j in range(K):
        chosen += tl.where(label == tl.load(labels_ptr + t * K + j), tl.load(grads_ptr + t * K + j), 0.0)
    whole, rest = tl.load(lse_whole_ptr + t), tl.load(lse_rest_ptr + t)
    offset, slope = tl.load(offset_ptr + t), tl.load(slope_ptr + t)
    grad = choice_grads(z, ratio, whole, rest, offset, slope, chosen[None, :], logit_scale, HAS_SOFTCAP)
    places = out_ptr + t * stride_out + column[None, :]
    tl.store(places, grad.to(out_ptr.dtype.element_ty), mask=here[None, :])


def choice_forward(
    hidden_states: Tensor,  # (T, H) fp16, bf16 or fp32
    lm_head_weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (T, K) int64
    row_labels: Tensor,  # (T,) int64: IGNORE_INDEX where every label is
    logit_scale: float,
    softcap: float | None,
    outputs: tuple[str, ...],
    blocks: Blocks | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """The values of `fused_forward`, and the logits of the labels, (T, K) fp32: nan if outside the vocabulary."""
    labels = labels.contiguous()
    chosen = torch.full(labels.shape, torch.nan, dtype=torch.float32, device=labels.device)
    num_blocks = triton.cdiv(labels.shape[1], LABELS)

    def look_up(logits: Tensor, rows: slice, vocab: slice) -> None:
        choice_logits_kernel[(logits.shape[0], num_blocks)](
            chosen[rows],
            logits,
            labels if bias is None else bias[vocab],
            labels[rows],
            labels.shape[1],
            logits.shape[1],
            vocab.start,
            logits.stride(0),
            float(logit_scale),
            1.0 if softcap is None else float(softcap),
            HAS_BIAS=bias is not None,
            HAS_SOFTCAP=softcap is not None,
            BLOCK=LABELS,
            num_warps=4,
        )

    blocks = blocks or library_blocks(hidden_states)
    head = (lm_head_weight, bias, row_labels, logit_scale, softcap)
    return fused_forward(hidden_states, *head, outputs, blocks, visit=look_up), chosen


def fill_choice_grads(
    out: Tensor,  # (block_rows, block_vocab) of row stride >= block_vocab; the padding is filled with anything
    hidden_states: Tensor,  # (block_rows, H)
    weight: Tensor,  # (block_vocab, H)
    bias: Tensor | None,  # (block_vocab,)
    labels: Tensor,  # (block_rows, K) int64, contiguous
    grads: Tensor,  # (block_rows, K) fp32, contiguous, 0 at ignored labels
    lse_whole: Tensor,  # (block_rows,) fp32, inf in ignored rows, and so are the next three
    lse_rest: Tensor,
    offset: Tensor,
    slope: Tensor,
    first_vocab: int,
    logit_scale: float,
    softcap: float | None,
    blocks: Blocks | None = None,
) -> None:
    """Fills `out` with eq. (22)."""
    blocks = blocks or library_blocks(hidden_states)
    num_blocks = triton.cdiv(labels.shape[1], LABELS)
    scales = (float(logit_scale), 1.0 if softcap is None else float(softcap))
    options = {"HAS_BIAS": bias is not None, "HAS_SOFTCAP": softcap is not None}
    for logits, rows, vocab in logit_blocks(hidden_states, weight, blocks):
        some, some_bias = out[rows, vocab], labels if bias is None else bias[vocab]
        per_row = (lse_whole[rows], lse_rest[rows], offset[rows], slope[rows])
        strides = (logits.stride(0), out.stride(0))
        num_tiles = triton.cdiv(logits.shape[0], blocks.block_t) * triton.cdiv(logits.shape[1], blocks.block_v)
        choice_grads_kernel[(num_tiles,)](
            some,
            logits,
            some_bias,
            *per_row,
            *logits.shape,
            writable_columns(out, weight, vocab),
            *strides,
            *scales,
            **options,
            BLOCK_T=blocks.block_t,
            BLOCK_V=blocks.block_v,
            num_warps=blocks.num_warps,
        )
        choice_labels_kernel[(logits.shape[0], num_blocks)](
            some,
            logits,
            some_bias,
            labels[rows],
            grads[rows],
            *per_row,
            labels.shape[1],
            logits.shape[1],
            first_vocab + vocab.start,
            *strides,
            *scales,
            **options,
            BLOCK=LABELS,
            num_warps=4,
        )
