"""Masked and weighted sums over the tokens of each sequence, with their gradient: by one kernel, or in plain PyTorch.

In: numbers per row of the head, the row of each token, the end of each sequence. Out: sums per sequence, computed in
fp64, and lengths. On a GPU this takes one launch, and one more in backward; both are operators for torch.compile.
Deterministic: tokens are added in ascending order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastdpo.ops.engine import resolve_impl
from fastdpo.types import IGNORE_INDEX


class Tokens(NamedTuple):
    """The rows of each sequence, for a whole batch or a part of it."""

    ends: Tensor  # (S + 1,) int64, numbers of tokens
    rows: Tensor | None = None  # (N,) int64; None: token n is row n
    weights: Tensor | None = None  # (N,)
    first_row: int = 0  # of the part, where `rows` counts those of the batch
    span: tuple[int, int] | None = None  # the part's first token and the one after its last; None: all

    def part(self, rows: slice, tokens: slice, sequences: slice) -> Tokens:
        """Consecutive sequences of a whole batch, for values that begin at `rows.start`."""
        ends = self.ends[sequences.start : sequences.stop + 1]
        return Tokens(ends, self.rows, self.weights, rows.start, (tokens.start, tokens.stop))


def uses_kernel(impl: str, values: Tensor) -> bool:
    """Whether the Triton kernel computes sums of `values`. Raises ValueError if a named impl cannot run here."""
    if impl == "reference" or values.dtype == torch.float64:
        return False
    return resolve_impl(impl, values.device, torch.float32) == "triton"


def token_sums(
    values: Sequence[Tensor],
    tokens: Tokens,
    *,
    labels: Tensor | None = None,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> tuple[list[Tensor], Tensor]:
    """
    Args:
        values: each (T,); the sums of the first are differentiable in it, the others are statistics without gradient.
        labels: (T,) int64, for lengths.
        dtype: dtype of the sums; None for the first value's.
        impl: implementation of the head op, see `linear_logps`.
    Returns:
        (S,) sums of each value, 0.0 for a sequence without tokens; and (S,) int64 lengths, the number of tokens whose
        label is not IGNORE_INDEX, whatever their weight; (0,) without labels.
    """
    dtype = values[0].dtype if dtype is None else dtype
    wants_weight_grad = tokens.weights is not None and tokens.weights.requires_grad
    if uses_kernel(impl, values[0]) and not wants_weight_grad:
        span = (0, -1) if tokens.span is None else tokens.span
        first, *others = values
        sums, more, lengths = torch.ops.fastdpo.token_sums(
            first, others, labels, tokens.ends, tokens.rows, tokens.weights, tokens.first_row, *span, dtype
        )
        return [sums, *more.detach()], lengths
    return _plain_sums(values, tokens, labels, dtype)


def _plain_sums(
    values: Sequence[Tensor], tokens: Tokens, labels: Tensor | None, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    ends, rows, weights = tokens.ends, tokens.rows, tokens.weights
    if tokens.span is not None:
        part = slice(*tokens.span)
        ends = ends - part.start
        rows = None if rows is None else rows[part] - tokens.first_row
        weights = None if weights is None else weights[part]
    sums = []
    for number, value in enumerate(values):
        gathered = value if rows is None else value[rows]
        if weights is not None:
            gathered = gathered * weights
        total = segment_sums(gathered, ends).to(dtype)
        sums.append(total if number == 0 else total.detach())
    lengths = ends.new_empty(0) if labels is None else counted_tokens(labels, ends, rows)
    return sums, lengths


def counted_tokens(labels: Tensor, cu_seqlens: Tensor, rows: Tensor | None) -> Tensor:
    """(S,) int64: tokens of each sequence whose label is not IGNORE_INDEX. cu_seqlens and rows are int64."""
    keep = labels != IGNORE_INDEX
    num_kept = pad((keep if rows is None else keep[rows]).cumsum(0), (1, 0))
    return num_kept[cu_seqlens[1:]] - num_kept[cu_seqlens[:-1]]


def segment_sums(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(S,) fp64 sums in sequential order: the same bits every time, and exact to fp32."""
    return torch.segment_reduce(values.double(), "sum", offsets=cu_seqlens, initial=0.0, unsafe=True)


def _kernel_sums(  # type: ignore[no-untyped-def]
    logps, statistics, labels, ends, rows, weights, first_row, first_token, last_token, dtype
):
    """[(S,) sums of logps, (len(statistics), S) of the statistics, (S,) lengths]."""
    from fastdpo.kernels.token_sums import token_sums as launch

    ends, rows, weights = (None if x is None else x.contiguous() for x in (ends, rows, weights))
    with torch.cuda.device(logps.device if logps.is_cuda else -1):
        return list(launch([logps, *statistics], labels, ends, rows, weights, first_row, dtype))


def _kernel_grads(  # type: ignore[no-untyped-def]
    grad, num_rows, ends, rows, weights, first_row, first_token, last_token, dtype
):
    from fastdpo.kernels.token_sums import row_grads

    ends, rows, weights = (None if x is None else x.contiguous() for x in (ends, rows, weights))
    if last_token < 0:
        last_token = num_rows if rows is None else rows.shape[0]
    with torch.cuda.device(grad.device if grad.is_cuda else -1):
        return row_grads(grad, num_rows, ends, rows, weights, first_row, (first_token, last_token), dtype)


_PLACE = "Tensor ends, Tensor? rows, Tensor? weights, int first_row, int first_token, int last_token"
_sums_op = torch.library.custom_op(
    "fastdpo::token_sums",
    _kernel_sums,
    mutates_args=(),
    schema=f"(Tensor logps, Tensor[] statistics, Tensor? labels, {_PLACE}, ScalarType dtype) -> Tensor[]",
)
_grads_op = torch.library.custom_op(
    "fastdpo::row_grads",
    _kernel_grads,
    mutates_args=(),
    schema=f"(Tensor grad, SymInt num_rows, {_PLACE}, ScalarType dtype) -> Tensor",
)
_grads_op.register_fake(lambda grad, num_rows, *rest: grad.new_empty(num_rows, dtype=rest[-1]))


@_sums_op.register_fake
def _(logps, statistics, labels, ends, *rest):  # type: ignore[no-untyped-def]
    num_sequences, dtype = ends.shape[0] - 1, rest[-1]
    sums = logps.new_empty(num_sequences, dtype=dtype)
    lengths = ends.new_empty(0 if labels is None else num_sequences, dtype=torch.int64)
    return [sums, logps.new_empty((len(statistics), num_sequences), dtype=dtype), lengths]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    logps, statistics, _, ends, rows, weights, *place, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.num_rows, ctx.dtype, ctx.num_statistics, ctx.place = logps.shape[0], logps.dtype, len(statistics), place
    ctx.save_for_backward(ends, rows, weights)


def _grads(ctx: Any, grad_outputs: list[Tensor | None]) -> tuple[Any, ...]:
    grad = grad_outputs[0]
    if grad is not None:
        grad = torch.ops.fastdpo.row_grads(grad, ctx.num_rows, *ctx.saved_tensors, *ctx.place, ctx.dtype)
    return (grad, [None] * ctx.num_statistics, *[None] * 8)


_sums_op.register_autograd(_grads, setup_context=_save)
