"""Logits by the matmul library, reduced block by block: an alternative for the forward's sums and for D.

In: the inputs of the kernels of `forward.py` and `backward.py`. Out: the same numbers. An fp32 block of logits of about
1,024 rows times 8,192 vocabulary ids is 34 MB, which stays in L2 between the product and the kernel that reads it once.
The library's faster matmul must outweigh this traffic; the tuner decides. As in all kernels here, fp32 operands are
multiplied without TF32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdpo.kernels.launch import Blocks, scratch
from fastdpo.kernels.logits import scale_logits, tile_grads
from fastdpo.kernels.merge import Partials
from fastdpo.kernels.sums import store_partials

BLOCK_ROWS, BLOCK_IDS = 1024, 8192  # logits that are there at once


@triton.jit
def read_logits(
    logits_ptr,  # (T, V) fp32, contiguous rows of stride_logits
    bias_ptr,  # (V,) or unused
    t,  # (BLOCK_T,) int64
    v,  # (BLOCK_V,) int64
    T,
    V,
    stride_logits,
    logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """`scale_logits` of the tile."""
    mask = (t < T)[:, None] & (v < V)[None, :]
    acc = tl.load(logits_ptr + t[:, None] * stride_logits + v[None, :], mask=mask, other=0.0)
    return scale_logits(acc, bias_ptr, tl.minimum(v, V - 1), logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP)


@triton.jit(
    do_not_specialize=["T", "first_row", "first_tile", "num_rows"],
    do_not_specialize_on_alignment=[
        *("bias_ptr", "labels_ptr", "sumexp_ptr", "sum_z_exp_ptr", "sum_sq_exp_ptr", "sum_z_ptr", "out_ptr")
    ],
)
def fold_kernel(
    logits_ptr,  # (T, V) fp32, a block
    bias_ptr,  # (V,) of the block's ids, or unused
    labels_ptr,  # (num_rows,) int64, and so on as in partials_kernel, of all rows and tiles
    label_logit_ptr,
    max_ptr,
    sumexp_ptr,
    sum_z_exp_ptr,
    sum_sq_exp_ptr,
    sum_z_ptr,
    out_ptr,  # (num_rows, num_vocab) in the operands' dtype, or unused
    T,
    V,
    first_row,
    first_tile,
    num_rows,
    num_vocab,
    stride_logits,
    stride_out,
    logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    WITH_SQUARES: tl.constexpr,
    WITH_MEAN: tl.constexpr,
    WITH_GRADS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """eq. (3), and with WITH_GRADS (13), for one tile of a block of logits."""
    num_tiles = tl.cdiv(V, BLOCK_V)
    row_block, tile = tl.program_id(0) // num_tiles, tl.program_id(0) % num_tiles
    t = row_block.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    v = tile.to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    z, ratio = read_logits(logits_ptr, bias_ptr, t, v, T, V, stride_logits, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP)
    store_partials(
        z,
        ratio,
        first_row + t,
        t < T,
        first_tile + tile,
        num_rows,
        num_vocab,
        labels_ptr,
        label_logit_ptr,
        max_ptr,
        sumexp_ptr,
        sum_z_exp_ptr,
        sum_sq_exp_ptr,
        sum_z_ptr,
        out_ptr + first_row.to(tl.int64) * stride_out,
        row_block,
        stride_out,
        HAS_SOFTCAP,
        WITH_ENTROPY,
        WITH_SQUARES,
        WITH_MEAN,
        WITH_GRADS,
        BLOCK_T,
        BLOCK_V,
    )


@triton.jit(
    do_not_specialize=["T", "first_vocab"],
    do_not_specialize_on_alignment=[
        *("bias_ptr", "labels_ptr", "lse_whole_ptr", "lse_rest_ptr", "row_scale_ptr", "out_ptr")
    ],
)
def fold_grads_kernel(
    out_ptr,  # (T, V), a block
    logits_ptr,  # (T, V) fp32, the same block
    bias_ptr,  # (V,) or unused
    labels_ptr,  # (T,) int64, and so on as in logit_grads_kernel
    lse_whole_ptr,
    lse_rest_ptr,
    row_scale_ptr,
    T,
    V,
    first_vocab,
    num_vocab,
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
    """eq. (9) times the row's factor for one tile."""
    num_tiles = tl.cdiv(V, BLOCK_V)
    row_block, tile = tl.program_id(0) // num_tiles, tl.program_id(0) % num_tiles
    t = row_block.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    v = tile.to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    z, ratio = read_logits(logits_ptr, bias_ptr, t, v, T, V, stride_logits, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP)
    grad = tile_grads(
        z,
        ratio,
        first_vocab + v,
        tl.minimum(t, T - 1),
        labels_ptr,
        lse_whole_ptr,
        lse_rest_ptr,
        row_scale_ptr,
        num_vocab,
        HAS_SOFTCAP,
    )
    mask = (t < T)[:, None] & (v < width)[None, :]
    tl.store(out_ptr + t[:, None] * stride_out + v[None, :], grad.to(out_ptr.dtype.element_ty), mask=mask)


def library_partials(
    partials: Partials,
    out: Tensor | None,
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    logit_scale: float,
    softcap: float | None,
    wants: dict[str, bool],
    blocks: Blocks,
    visit: Callable[[Tensor, slice, slice], None] | None = None,
    adapter_weight: Tensor | None = None,
) -> None:
    """Fills partials like `partials_kernel`, from blocks of logits with tiles of blocks.block_t x blocks.block_v.

    `visit` gets every block of logits before bias and scale, its rows and its ids.
    """
    for logits, rows, vocab in logit_blocks(hidden_states, weight, blocks, adapter_weight):
        num_tiles = triton.cdiv(logits.shape[0], blocks.block_t) * triton.cdiv(logits.shape[1], blocks.block_v)
        fold_kernel[(num_tiles,)](
            logits,
            labels if bias is None else bias[vocab],
            labels,
            *partials,
            partials.label_logit if out is None else out,
            *logits.shape,
            rows.start,
            vocab.start // blocks.block_v,
            len(labels),
            len(weight),
            logits.stride(0),
            len(weight) if out is None else out.stride(0),
            float(logit_scale),
            1.0 if softcap is None else float(softcap),
            HAS_BIAS=bias is not None,
            HAS_SOFTCAP=softcap is not None,
            **wants,
            WITH_GRADS=out is not None,
            BLOCK_T=blocks.block_t,
            BLOCK_V=blocks.block_v,
            num_warps=blocks.num_warps,
        )
        if visit is not None:
            visit(logits, rows, vocab)


def library_grads(
    out: Tensor,
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    lse_whole: Tensor,
    lse_rest: Tensor,
    row_scale: Tensor,
    first_vocab: int,
    num_vocab: int,
    logit_scale: float,
    softcap: float | None,
    blocks: Blocks,
) -> None:
    """Fills `out` like `logit_grads_kernel`."""
    for logits, rows, vocab in logit_blocks(hidden_states, weight, blocks):
        num_tiles = triton.cdiv(logits.shape[0], blocks.block_t) * triton.cdiv(logits.shape[1], blocks.block_v)
        some = out[rows, vocab]
        fold_grads_kernel[(num_tiles,)](
            some,
            logits,
            labels if bias is None else bias[vocab],
            labels[rows],
            lse_whole[rows],
            lse_rest[rows],
            row_scale[rows],
            *logits.shape,
            first_vocab + vocab.start,
            num_vocab,
            writable_columns(out, weight, vocab),
            logits.stride(0),
            out.stride(0),
            float(logit_scale),
            1.0 if softcap is None else float(softcap),
            HAS_BIAS=bias is not None,
            HAS_SOFTCAP=softcap is not None,
            BLOCK_T=blocks.block_t,
            BLOCK_V=blocks.block_v,
            num_warps=blocks.num_warps,
        )


def writable_columns(out: Tensor, weight: Tensor, vocab: slice) -> int:
    """How many columns of `out` a block of these ids may write: the last one the padding too."""
    return out.stride(0) - vocab.start if vocab.stop == len(weight) else vocab.stop - vocab.start


def logit_blocks(
    hidden_states: Tensor, weight: Tensor, blocks: Blocks, adapter_weight: Tensor | None = None
) -> Iterator[tuple[Tensor, slice, slice]]:
    """Products before bias and scale, each valid until the next one; ids start at multiples of a tile."""
    T, (V, H) = len(hidden_states), weight.shape
    ids = max(1, BLOCK_IDS // blocks.block_v) * blocks.block_v
    size = min(T, BLOCK_ROWS) * min(V, ids)
    space = scratch((size,), hidden_states, torch.float32)
    more = None if adapter_weight is None else scratch((size,), hidden_states, torch.float32)
    for first_row in range(0, T, BLOCK_ROWS):
        rows = slice(first_row, min(first_row + BLOCK_ROWS, T))
        for first in range(0, V, ids):
            vocab = slice(first, min(first + ids, V))
            shape = (rows.stop - rows.start, vocab.stop - vocab.start)
            logits = space[: shape[0] * shape[1]].view(shape)
            _multiply(logits, hidden_states[rows, :H], weight[vocab])
            if more is not None and adapter_weight is not None:
                added, r = more[: shape[0] * shape[1]].view(shape), adapter_weight.shape[1]
                _multiply(added, hidden_states[rows, H : H + r], adapter_weight[vocab])
                logits += added
            yield logits, rows, vocab


def _multiply(out: Tensor, hidden_states: Tensor, weight: Tensor) -> None:
    """`hidden_states @ weight.T` summed in fp32; operands are converted to fp32 if the device needs it."""
    if hidden_states.is_cuda and hidden_states.dtype != torch.float32:
        torch.mm(hidden_states, weight.T, out_dtype=torch.float32, out=out)
        return
    with _whole_products():
        torch.mm(hidden_states.float(), weight.float().T, out=out)


@contextmanager
def _whole_products() -> Iterator[None]:
    kind = torch.backends.cuda.matmul
    before = kind.fp32_precision
    kind.fp32_precision = "ieee"
    try:
        yield
    finally:
        kind.fp32_precision = before
