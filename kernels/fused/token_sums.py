"""Masked sums over sequences, (7) summed: each token's number is gathered by its row, weighted, and added in fp64.

In: numbers per row, the row of each token, the end of each sequence, and optional token weights. Out: a sum per
sequence, and its number of tokens with a label. The gradient of a row is the sum over the tokens that use it. No
atomics: each sum belongs to one program, which adds in ascending order of tokens. A row index out of bounds is not read
and makes its sequence nan.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdpo.types import IGNORE_INDEX

IGNORED = tl.constexpr(IGNORE_INDEX)
MOST_VALUES = 4  # numbers per row that one launch sums
SUM_TOKENS = 1024  # that a program adds up at once
GRAD_ROWS, GRAD_TOKENS, GRAD_SPAN = 128, 32, 1024  # rows of a program; tokens compared with them at once, looked over


@triton.jit(
    do_not_specialize=["num_rows", "num_tokens", "first_row", "stride_more"],
    do_not_specialize_on_alignment=[  # slices, which start anywhere
        *("out_ptr", "more_ptr", "lengths_ptr", "value_0_ptr", "value_1_ptr", "value_2_ptr", "value_3_ptr"),
        *("labels_ptr", "rows_ptr", "weights_ptr", "ends_ptr"),
    ],
)
def token_sums_kernel(
    out_ptr,  # (S,) sums of value 0
    more_ptr,  # (NUM_VALUES - 1, S) of the others
    lengths_ptr,  # (S,) int64, or unused
    value_0_ptr,  # (T,), and so are the next three, as far as NUM_VALUES goes
    value_1_ptr,
    value_2_ptr,
    value_3_ptr,
    labels_ptr,  # (T,) int64, or unused
    rows_ptr,  # (N,) int64, or unused: token n is row n
    weights_ptr,  # (N,), or unused
    ends_ptr,  # (S + 1,) int64
    num_rows,  # T
    num_tokens,  # N
    first_row,  # which number row 0 of the values has in `rows`
    stride_more,
    NUM_VALUES: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    WITH_LENGTHS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    s = tl.program_id(0).to(tl.int64)
    start = tl.maximum(tl.load(ends_ptr + s), 0)
    stop = tl.minimum(tl.load(ends_ptr + s + 1), num_tokens)
    sum_0 = tl.zeros((BLOCK,), tl.float64)
    sum_1 = tl.zeros((BLOCK,), tl.float64)
    sum_2 = tl.zeros((BLOCK,), tl.float64)
    sum_3 = tl.zeros((BLOCK,), tl.float64)
    length = tl.zeros((BLOCK,), tl.int64)
    for first in range(start, stop, BLOCK):
        n = first + tl.arange(0, BLOCK).to(tl.int64)
        mask = n < stop
        row = n
        if HAS_ROWS:
            row = tl.load(rows_ptr + n, mask=mask, other=0)
        row -= first_row
        there = mask & (row >= 0) & (row < num_rows)
        weight = tl.where(mask & (row >= 0) & (row < num_rows), 1.0, float("nan")).to(tl.float64)
        if HAS_WEIGHTS:
            weight *= tl.load(weights_ptr + n, mask=mask, other=0.0).to(tl.float64)
        sum_0 += tl.where(mask, weight * tl.load(value_0_ptr + row, mask=there, other=0).to(tl.float64), 0.0)
        if NUM_VALUES > 1:
            sum_1 += tl.where(mask, weight * tl.load(value_1_ptr + row, mask=there, other=0).to(tl.float64), 0.0)
        if NUM_VALUES > 2:
            sum_2 += tl.where(mask, weight * tl.load(value_2_ptr + row, mask=there, other=0).to(tl.float64), 0.0)
        if NUM_VALUES > 3:
            sum_3 += tl.where(mask, weight * tl.load(value_3_ptr + row, mask=there, other=0).to(tl.float64), 0.0)
        if WITH_LENGTHS:
            length += (tl.load(labels_ptr + row, mask=there, other=IGNORED) != IGNORED).to(tl.int64)
    dtype = out_ptr.dtype.element_ty
    tl.store(out_ptr + s, tl.sum(sum_0, axis=0).to(dtype))
    if NUM_VALUES > 1:
        tl.store(more_ptr + s, tl.sum(sum_1, axis=0).to(dtype))
    if NUM_VALUES > 2:
        tl.store(more_ptr + stride_more + s, tl.sum(sum_2, axis=0).to(dtype))
    if NUM_VALUES > 3:
        tl.store(more_ptr + 2 * stride_more + s, tl.sum(sum_3, axis=0).to(dtype))
    if WITH_LENGTHS:
        tl.store(lengths_ptr + s, tl.sum(length, axis=0))


@triton.jit
def sequence_of(n, ends_ptr, num_sequences, num_steps):
    """The sequence that token n, (BLOCK,), is in: how many sequences end at or before it."""
    low = tl.zeros_like(n)
    high = low + num_sequences
    for _ in range(num_steps):
        middle = (low + high) // 2
        is_open = low < high
        ends_before = is_open & (tl.load(ends_ptr + middle + 1, mask=is_open, other=0) <= n)
        high = tl.where(is_open & (ends_before == 0), middle, high)
        low = tl.where(ends_before, middle + 1, low)
    return low


@triton.jit
def token_grads(n, mask, grad_ptr, weights_ptr, ends_ptr, num_sequences, num_steps, HAS_WEIGHTS: tl.constexpr):
    """What each token n, (BLOCK,), adds to the gradient of its row, fp64."""
    s = sequence_of(n, ends_ptr, num_sequences, num_steps)
    grad = tl.load(grad_ptr + s, mask=mask & (s < num_sequences), other=0.0).to(tl.float64)
    if HAS_WEIGHTS:
        grad *= tl.load(weights_ptr + n, mask=mask, other=0.0).to(tl.float64)
    return tl.where(mask, grad, 0.0)


@triton.jit(
    do_not_specialize=["num_rows", "first_row", "first_token", "last_token", "num_sequences", "num_steps"],
    do_not_specialize_on_alignment=["out_ptr", "grad_ptr", "rows_ptr", "weights_ptr", "ends_ptr"],
)
def row_grads_kernel(
    out_ptr,  # (T,)
    grad_ptr,  # (S,) upstream gradients of the sums
    rows_ptr,  # and the next two: as in token_sums_kernel
    weights_ptr,
    ends_ptr,
    num_rows,  # T
    first_row,
    first_token,  # of the sequences
    last_token,  # the one after it
    num_sequences,
    num_steps,  # that a search among them takes
    HAS_ROWS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Every program looks all tokens over for those that use its rows; only where some may, they are compared."""
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    acc = tl.zeros((ROWS,), tl.float64)
    if HAS_ROWS:
        least = tl.program_id(0).to(tl.int64) * ROWS + first_row
        for first in range(first_token, last_token, SPAN):
            span = first + tl.arange(0, SPAN).to(tl.int64)
            rows = tl.load(rows_ptr + span, mask=span < last_token, other=-1)
            if tl.max(((rows >= least) & (rows < least + ROWS)).to(tl.int32), axis=0) > 0:
                for start in range(first, tl.minimum(first + SPAN, last_token), TOKENS):
                    n = start + tl.arange(0, TOKENS).to(tl.int64)
                    mask = n < last_token
                    row = tl.load(rows_ptr + n, mask=mask, other=-1) - first_row
                    grad = token_grads(n, mask, grad_ptr, weights_ptr, ends_ptr, num_sequences, num_steps, HAS_WEIGHTS)
                    acc += tl.sum(tl.where(t[:, None] == row[None, :], grad[None, :], 0.0), axis=1)
    else:
        n = t + first_row
        mask = (n >= first_token) & (n < last_token)
        acc = token_grads(n, mask, grad_ptr, weights_ptr, ends_ptr, num_sequences, num_steps, HAS_WEIGHTS)
    tl.store(out_ptr + t, acc.to(out_ptr.dtype.element_ty), mask=t < num_rows)


def token_sums(
    values: Sequence[Tensor],  # each (T,), at least one
    labels: Tensor | None,  # (T,) int64, where lengths are wanted
    ends: Tensor,  # (S + 1,) int64, contiguous; numbers of tokens
    rows: Tensor | None,  # (N,) int64, contiguous
    weights: Tensor | None,  # (N,), contiguous
    first_row: int,  # which number row 0 of `values` has in `rows`
    dtype: torch.dtype,  # of the sums: fp32 or fp64
) -> tuple[Tensor, Tensor, Tensor]:
    """(S,) sums of the first value, (len(values) - 1, S) of the others, and (S,) int64 numbers of tokens whose label is
    not IGNORE_INDEX, (0,) without labels."""
    num_sequences, num_rows = ends.shape[0] - 1, values[0].shape[0]
    sums = torch.empty(num_sequences, dtype=dtype, device=ends.device)
    more = torch.empty((len(values) - 1, num_sequences), dtype=dtype, device=ends.device)
    lengths = torch.empty(0 if labels is None else num_sequences, dtype=torch.int64, device=ends.device)
    # the kernel reads bool as bytes
    read = [x.contiguous().view(torch.uint8) if x.dtype == torch.bool else x.contiguous() for x in values]
    outs = [sums, *more]
    for start in range(0, len(values) if num_sequences > 0 else 0, MOST_VALUES):
        some = read[start : start + MOST_VALUES]
        with_lengths = labels is not None and start == 0
        token_sums_kernel[(num_sequences,)](
            outs[start],
            outs[min(start + 1, len(outs) - 1)],
            lengths if with_lengths else ends,
            *(some[min(i, len(some) - 1)] for i in range(MOST_VALUES)),
            labels.contiguous() if labels is not None else ends,
            ends if rows is None else rows,
            sums if weights is None else weights,
            ends,
            num_rows,
            first_row + num_rows if rows is None else rows.shape[0],
            first_row,
            num_sequences,
            NUM_VALUES=len(some),
            HAS_ROWS=rows is not None,
            HAS_WEIGHTS=weights is not None,
            WITH_LENGTHS=with_lengths,
            BLOCK=SUM_TOKENS,
            num_warps=4,
        )
    return sums, more, lengths


def row_grads(
    grad: Tensor,  # (S,)
    num_rows: int,
    ends: Tensor,
    rows: Tensor | None,
    weights: Tensor | None,
    first_row: int,
    tokens: tuple[int, int],  # the first of the sequences, and the one after their last
    dtype: torch.dtype,
) -> Tensor:
    """(num_rows,): the gradient of the first value, from the gradients of the sums."""
    out = torch.empty(num_rows, dtype=dtype, device=grad.device)
    num_sequences = ends.shape[0] - 1
    if num_rows > 0:
        row_grads_kernel[(triton.cdiv(num_rows, GRAD_ROWS),)](
            out,
            grad.contiguous(),
            ends if rows is None else rows,
            grad if weights is None else weights,
            ends,
            num_rows,
            first_row,
            *tokens,
            num_sequences,
            num_sequences.bit_length(),
            HAS_ROWS=rows is not None,
            HAS_WEIGHTS=weights is not None,
            ROWS=GRAD_ROWS,
            TOKENS=GRAD_TOKENS,
            SPAN=GRAD_SPAN,
            num_warps=4,
        )
    return out
