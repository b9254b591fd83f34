"""Turns the exponentials that forward left in a (T, V) tensor into the logits' gradient, once every row's lse is known.

In: eq. (13), relative to each tile's own maximum, and the merged values. Out: eq. (9) in place. One pass over the
tensor, no matmul. Ignored rows become 0, rows with a label outside the vocabulary nan.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastdpo.kernels.logits import tanh
from fastdpo.kernels.merge import Partials
from fastdpo.types import ELSEWHERE, IGNORE_INDEX

IGNORED = tl.constexpr(IGNORE_INDEX)
FOREIGN = tl.constexpr(ELSEWHERE)
FINISH_ROWS = 16  # rows that one program rewrites, over the columns of one vocabulary tile


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["labels_ptr"])
def finish_grads_kernel(
    out_ptr,  # (T, V)
    labels_ptr,  # (T,) int64
    label_logit_ptr,  # (T,) fp32, and so are the next three
    logps_ptr,
    lse_whole_ptr,
    lse_rest_ptr,
    max_ptr,  # (num_tiles, T) fp32
    T,
    V,
    stride_out,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,  # width of a vocabulary tile
):
    """eq. (14)."""
    tile = tl.program_id(0) % tl.cdiv(V, BLOCK_V)
    t = (tl.program_id(0) // tl.cdiv(V, BLOCK_V)).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    v = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    in_rows = t < T

    label = tl.load(labels_ptr + t, mask=in_rows, other=IGNORED)  # (ROWS,)
    has_label = in_rows & (label >= 0) & (label < V)
    tile_max = tl.load(max_ptr + tile.to(tl.int64) * T + t, mask=in_rows, other=0.0)
    lse_whole = tl.load(lse_whole_ptr + t, mask=in_rows, other=0.0)
    row_scale = tl.where(has_label | (label == FOREIGN), tl.exp(tile_max - lse_whole), float("nan"))

    at_label = expm1(tl.load(logps_ptr + t, mask=has_label, other=0.0))
    at_label *= tl.exp(tl.load(lse_rest_ptr + t, mask=has_label, other=0.0))
    if HAS_SOFTCAP:
        ratio = tl.load(label_logit_ptr + t, mask=has_label, other=0.0) / softcap
        at_label *= 1.0 - ratio * ratio

    out_ptrs = out_ptr + t[:, None] * stride_out + v[None, :]
    mask = in_rows[:, None] & (v < stride_out)[None, :]  # and the padding, so that words are wide
    grad = tl.load(out_ptrs, mask=mask, other=0.0).to(tl.float32) * row_scale[:, None]  # (ROWS, BLOCK_V)
    grad = tl.where(v[None, :] == label[:, None], at_label[:, None], grad)
    grad = tl.where((label == IGNORED)[:, None], 0.0, grad)
    tl.store(out_ptrs, grad.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def expm1(x):
    """exp(x) - 1 for x <= 0 without cancellation near 0."""
    half = tanh(0.5 * x)
    return 2.0 * half / (1.0 - half)


def finish_grads(
    out: Tensor,  # (T, V), rows maybe padded
    partials: Partials,
    labels: Tensor,  # (T,) int64, contiguous
    values: dict[str, Tensor],  # logps, lse_whole and lse_rest, (T,) fp32
    softcap: float | None,
    block_v: int,  # width of the vocabulary tiles of `partials`
) -> None:
    T, V = out.shape
    finish_grads_kernel[(triton.cdiv(T, FINISH_ROWS) * partials.max.shape[0],)](
        out,
        labels,
        partials.label_logit,
        values["logps"],
        values["lse_whole"],
        values["lse_rest"],
        partials.max,
        T,
        V,
        out.stride(0),
        1.0 if softcap is None else float(softcap),
        HAS_SOFTCAP=softcap is not None,
        ROWS=FINISH_ROWS,
        BLOCK_V=block_v,
        num_warps=4,
    )
