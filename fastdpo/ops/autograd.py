"""The head op as two torch operators: torch.compile, FakeTensor, checkpointing and autograd take it as one node.

`fastdpo::linear_logps` keeps (T,) numbers for backward, never logits; `fastdpo::linear_logps_backward` recomputes tiles
and computes the gradients that are needed and no others. Where the hidden states alone want a gradient (a frozen head),
forward makes that gradient up to its factor per row, and backward multiplies. In: what `linear_logps` has validated,
except for what only the values can tell: labels outside the vocabulary are refused here, on the CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastdpo.ops.eager import hidden_grad_in_forward
from fastdpo.ops.engine import Engine, engine_of, resolve_impl
from fastdpo.ops.gradients import head_gradients
from fastdpo.ops.head import ALWAYS, Head, SplitLse, row_scale
from fastdpo.ops.matmul import accumulator_dtype
from fastdpo.ops.skipping import kept_tiles, row_order
from fastdpo.ops.validation import check_labels
from fastdpo.types import IGNORE_INDEX, TokenLogps

_HEAD = "float logit_scale, float? softcap, str outputs, float skip_tolerance"
_INPUTS = "Tensor hidden_states, Tensor lm_head_weight, Tensor? bias, Tensor labels"


def differentiable_logps(
    hidden_states: Tensor,  # (T, H)
    lm_head_weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (T,) int64
    head: Head,
    impl: str,  # "auto", "triton" or "tiled"
    dtype: torch.dtype,  # of the matmuls' operands: the inputs' own, or autocast's
) -> TokenLogps:
    frozen_head = not (lm_head_weight.requires_grad or (bias is not None and bias.requires_grad))
    grad_in_forward = torch.is_grad_enabled() and hidden_states.requires_grad and frozen_head
    values = torch.ops.fastdpo.linear_logps(
        hidden_states,
        lm_head_weight,
        bias,
        labels,
        head.logit_scale,
        head.softcap,
        ",".join(head.outputs),
        head.skip_tolerance,
        impl,
        dtype,
        grad_in_forward,
    )
    statistics = values[len(ALWAYS) : len(ALWAYS) + len(head.outputs)]
    return TokenLogps(values[0], **{name: x.detach() for name, x in zip(head.outputs, statistics, strict=True)})


def _head(logit_scale: float, softcap: float | None, outputs: str, skip_tolerance: float) -> Head:
    return Head(logit_scale, softcap, tuple(filter(None, outputs.split(","))), skip_tolerance)


def _kept_shape(hidden_states: Tensor, lm_head_weight: Tensor, engine: Engine) -> tuple[int, int]:
    block_rows, block_vocab = engine.skip_blocks(hidden_states)
    return -(-hidden_states.shape[0] // block_rows), -(-lm_head_weight.shape[0] // block_vocab)


def forward(
    hidden_states,
    lm_head_weight,
    bias,
    labels,
    logit_scale,
    softcap,
    outputs,
    skip_tolerance,
    impl,
    dtype,
    grad_in_forward,
):
    """[logps, lse_whole, lse_rest, *outputs], each (T,); where tiles may be skipped, `kept` and the order of rows that
    its blocks take, (T,); where it is made in forward, dH per unit of upstream gradient, (T, H) in the sums' dtype."""
    head = _head(logit_scale, softcap, outputs, skip_tolerance)
    impl = resolve_impl(impl, hidden_states.device, dtype)
    engine, T = engine_of(impl), labels.shape[0]
    rows = None
    if labels.device.type == "cpu":
        check_labels(labels, lm_head_weight.shape[0])
        if impl == "tiled":  # ignored rows cost nothing where counting them does not stop a device
            rows = _rows_where(labels != IGNORE_INDEX)
    hidden_states, labels = _take(rows, hidden_states, labels)
    with torch.autocast(hidden_states.device.type, enabled=False):
        args = (hidden_states.to(dtype), lm_head_weight.to(dtype), None if bias is None else bias.to(dtype), labels)
        extra: list[Tensor] = []
        if grad_in_forward and skip_tolerance == 0:
            values, unit_grad = hidden_grad_in_forward(*args, head, engine)
            extra = [_spread(rows, unit_grad, T)]
        else:
            values = engine.forward(*args, head)
            if skip_tolerance > 0:
                block_rows, block_vocab = engine.skip_blocks(hidden_states)
                order = row_order(values, labels)
                kept = kept_tiles(values, labels, order, skip_tolerance, block_rows, block_vocab)
                extra = [pad(kept, (0, 0, 0, -(-T // block_rows) - len(kept))), pad(order, (0, T - len(order)))]
    return [*(_spread(rows, values[name], T) for name in (*ALWAYS, *head.outputs)), *extra]


def backward(
    grad_logps, hidden_states, lm_head_weight, bias, labels, lse_whole, lse_rest, kept, order,
    logit_scale, softcap, outputs, skip_tolerance, impl, dtype, needed,
):  # fmt: skip
    """The needed ones of dH (T, H), dW (V, H) and db (V,), each in its input's dtype."""
    head = _head(logit_scale, softcap, outputs, skip_tolerance)
    impl = resolve_impl(impl, hidden_states.device, dtype)
    engine, T = engine_of(impl), labels.shape[0]
    inputs = (hidden_states, lm_head_weight, bias)
    grad_dtypes = [x.dtype if wanted else None for x, wanted in zip(inputs, needed, strict=True)]
    scale = row_scale(grad_logps, lse_rest, labels, head)
    rows = None
    if impl == "tiled" and labels.device.type == "cpu":
        # Rows whose upstream gradient is exactly zero cost nothing: ignored ones, and pairs that the loss has settled.
        # Skipped tiles belong to blocks of the rows that forward kept, so there only those are left out.
        rows = _rows_where(scale != 0 if kept is None else labels != IGNORE_INDEX)
    if order is not None:
        rows = order if rows is None else rows[order[: len(rows)]]
    hidden_states, labels, lse_whole, lse_rest, scale = _take(rows, hidden_states, labels, lse_whole, lse_rest, scale)
    with torch.autocast(hidden_states.device.type, enabled=False):
        args = (hidden_states.to(dtype), lm_head_weight.to(dtype), None if bias is None else bias.to(dtype), labels)
        lse = SplitLse(lse_whole, lse_rest)
        if kept is None:
            logit_grads = engine.logit_grads(*args, lse, head)
            grads = head_gradients(logit_grads, args[0], args[1], scale, *grad_dtypes)
        else:
            grads = engine.skipping_gradients(*args, lse, head, scale, kept, *grad_dtypes)
    grad_hidden, *others = grads
    if grad_hidden is not None:
        grad_hidden = _spread(rows, grad_hidden, T)
    return [grad for grad in (grad_hidden, *others) if grad is not None]


_forward_op = torch.library.custom_op(
    "fastdpo::linear_logps",
    forward,
    mutates_args=(),
    schema=f"({_INPUTS}, {_HEAD}, str impl, ScalarType dtype, bool grad_in_forward) -> Tensor[]",
)
_backward_op = torch.library.custom_op(
    "fastdpo::linear_logps_backward",
    backward,
    mutates_args=(),
    schema=f"(Tensor grad_logps, {_INPUTS}, Tensor lse_whole, Tensor lse_rest, Tensor? kept, Tensor? order, {_HEAD}, "
    "str impl, ScalarType dtype, bool[] needed) -> Tensor[]",
)


@_forward_op.register_fake
def _(
    hidden_states,
    lm_head_weight,
    bias,
    labels,
    logit_scale,
    softcap,
    outputs,
    skip_tolerance,
    impl,
    dtype,
    grad_in_forward,
):
    head = _head(logit_scale, softcap, outputs, skip_tolerance)
    acc_dtype = accumulator_dtype(dtype)
    values = [
        labels.new_empty(labels.shape, dtype=torch.bool if name == "is_top1" else acc_dtype)
        for name in (*ALWAYS, *head.outputs)
    ]
    if grad_in_forward and skip_tolerance == 0:
        values.append(hidden_states.new_empty(hidden_states.shape, dtype=acc_dtype))
    elif skip_tolerance > 0:
        engine = engine_of(resolve_impl(impl, hidden_states.device, dtype))
        values.append(labels.new_empty(_kept_shape(hidden_states, lm_head_weight, engine), dtype=torch.bool))
        values.append(labels.new_empty(labels.shape))
    return values


@_backward_op.register_fake
def _(
    grad_logps, hidden_states, lm_head_weight, bias, labels, lse_whole, lse_rest, kept, order,
    logit_scale, softcap, outputs, skip_tolerance, impl, dtype, needed,
):  # fmt: skip
    inputs = (hidden_states, lm_head_weight, bias)
    return [x.new_empty(x.shape) for x, wanted in zip(inputs, needed, strict=True) if wanted]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    hidden_states, lm_head_weight, bias, labels, *head, impl, dtype, grad_in_forward = inputs
    ctx.set_materialize_grads(False)
    _, lse_whole, lse_rest, *rest = output
    num_outputs = len(_head(*head).outputs)
    extra = [*rest[num_outputs:], None, None][:2]
    ctx.head, ctx.impl, ctx.dtype = head, impl, dtype
    ctx.unit_grad = grad_in_forward and head[-1] == 0
    if ctx.unit_grad:
        ctx.hidden_dtype = hidden_states.dtype
        ctx.save_for_backward(extra[0])
    else:
        # Saves the originals, not the casts: under autocast a second copy of the head would live until backward.
        ctx.save_for_backward(hidden_states, lm_head_weight, bias, labels, lse_whole, lse_rest, *extra)


def _grads(ctx: Any, grad_outputs: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    grad_logps = grad_outputs[0]
    grads: list[Tensor | None] = [None, None, None]
    if grad_logps is not None and ctx.unit_grad:
        grads[0] = (ctx.saved_tensors[0] * grad_logps[:, None]).to(ctx.hidden_dtype)
    elif grad_logps is not None:
        *inputs, lse_whole, lse_rest, kept, order = ctx.saved_tensors
        needed = list(ctx.needs_input_grad[:3])
        found = iter(
            torch.ops.fastdpo.linear_logps_backward(
                grad_logps, *inputs, lse_whole, lse_rest, kept, order,
                *ctx.head, ctx.impl, ctx.dtype, needed,
            )
        )  # fmt: skip
        grads = [next(found) if wanted else None for wanted in needed]
    return (*grads, *[None] * (len(ctx.needs_input_grad) - 3))


_forward_op.register_autograd(_grads, setup_context=_save)


def _rows_where(keep: Tensor) -> Tensor | None:
    """Indices of the kept rows; None if that is all of them."""
    rows = keep.nonzero()[:, 0]
    return None if rows.shape[0] == keep.shape[0] else rows


def _take(rows: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tensors if rows is None else tuple(x[rows] for x in tensors)


def _spread(rows: Tensor | None, x: Tensor, num_rows: int) -> Tensor:
    """`x` at its places among `num_rows` rows, zeros elsewhere."""
    return x if rows is None else x.new_zeros(num_rows, *x.shape[1:]).index_copy_(0, rows, x)
