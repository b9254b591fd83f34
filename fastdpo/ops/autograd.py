"""The head op as two torch operators, so that torch.compile, FakeTensor, checkpointing and autograd see one node.

`fastdpo::linear_logps` saves (T,) numbers for backward, never logits; `fastdpo::linear_logps_backward` recomputes tiles
and computes only the needed gradients. If only the hidden states need a gradient (a frozen head), forward computes it
up to a factor per row, (T, H), and backward multiplies by the factor. In: arguments that `linear_logps` has validated;
only the values of labels are checked here, on the CPU. Refuses a second derivative.
"""

from __future__ import annotations

from dataclasses import astuple
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastdpo.ops.eager import hidden_grad_in_forward
from fastdpo.ops.engine import engine_of, resolve_impl
from fastdpo.ops.gradients import head_gradients
from fastdpo.ops.head import ALWAYS, Head, SplitLse, row_scale
from fastdpo.ops.matmul import accumulator_dtype
from fastdpo.ops.shard import Shard
from fastdpo.ops.skipping import kept_tiles, row_order
from fastdpo.ops.validation import check_labels
from fastdpo.types import IGNORE_INDEX, TokenLogps


class Settings(NamedTuple):
    """The non-tensor arguments of both operators, in types that an operator schema supports."""

    logit_scale: float
    softcap: float | None
    outputs: str  # names joined by commas
    skip_tolerance: float
    workspace_bytes: int | None
    impl: str  # "auto", "triton" or "tiled"
    dtype: torch.dtype  # of the matmuls' operands: the inputs' own, or autocast's
    group_name: str  # of the processes that share the vocabulary; empty: this one has all of it
    num_vocab: int

    @property
    def head(self) -> Head:
        names = tuple(filter(None, self.outputs.split(",")))
        shard = Shard(self.group_name, self.num_vocab) if self.group_name else None
        return Head(self.logit_scale, self.softcap, names, self.skip_tolerance, self.workspace_bytes, shard)


_INPUTS = "Tensor hidden_states, Tensor lm_head_weight, Tensor? bias, Tensor labels"
_SETTINGS = (
    "float logit_scale, float? softcap, str outputs, float skip_tolerance, int? workspace_bytes, str impl, "
    "ScalarType dtype, str group_name, int num_vocab"
)


def differentiable_logps(
    hidden_states: Tensor,  # (T, H)
    lm_head_weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (T,) int64
    head: Head,
    impl: str,
    dtype: torch.dtype,
) -> TokenLogps:
    frozen_head = not (lm_head_weight.requires_grad or (bias is not None and bias.requires_grad))
    grad_in_forward = torch.is_grad_enabled() and hidden_states.requires_grad and frozen_head
    names = ",".join(head.outputs)
    group_name, num_vocab = ("", lm_head_weight.shape[0]) if head.shard is None else astuple(head.shard)
    settings = Settings(
        head.logit_scale,
        head.softcap,
        names,
        head.skip_tolerance,
        head.workspace_bytes,
        impl,
        dtype,
        group_name,
        num_vocab,
    )
    values = torch.ops.fastdpo.linear_logps(
        hidden_states, lm_head_weight, bias, labels, grad_in_forward and head.skip_tolerance == 0, *settings
    )
    statistics = values[len(ALWAYS) : len(ALWAYS) + len(head.outputs)]
    return TokenLogps(values[0], **{name: x.detach() for name, x in zip(head.outputs, statistics, strict=True)})


def forward(hidden_states, lm_head_weight, bias, labels, grad_in_forward, *settings):  # type: ignore[no-untyped-def]
    """[logps, lse_whole, lse_rest, *outputs], each (T,); if tiles may be skipped, also `kept` and the row order of its
    blocks, (T,); if made in forward, also dH per unit of upstream gradient, (T, H) in the sums' dtype."""
    settings = Settings(*settings)
    head, dtype, T = settings.head, settings.dtype, labels.shape[0]
    impl = resolve_impl(settings.impl, hidden_states.device, dtype)
    engine = engine_of(impl, head.shard)
    rows = None
    if labels.device.type == "cpu":
        check_labels(labels, settings.num_vocab)
        if impl == "tiled":  # ignored rows cost nothing where counting them does not stop a device
            rows = _rows_where(labels != IGNORE_INDEX)
    if head.shard is not None:
        labels = head.shard.local(labels)
    hidden_states, labels = _take(rows, hidden_states, labels)
    with torch.autocast(hidden_states.device.type, enabled=False):
        args = (hidden_states.to(dtype), lm_head_weight.to(dtype), None if bias is None else bias.to(dtype), labels)
        extra: list[Tensor] = []
        if grad_in_forward:
            values, unit_grad = hidden_grad_in_forward(*args, head, engine)
            if head.shard is not None:
                head.shard.reduce(unit_grad)
            extra = [_spread(rows, unit_grad, T)]
        else:
            values = engine.forward(*args, head)
        if head.skip_tolerance > 0:
            block_rows, block_vocab = engine.skip_blocks(hidden_states)
            order = row_order(values, labels)
            tolerance = head.skip_tolerance / (1 if head.shard is None else head.shard.group.size())
            kept = kept_tiles(values, labels, order, tolerance, block_rows, block_vocab)
            extra = [pad(kept, (0, 0, 0, -(-T // block_rows) - len(kept))), pad(order, (0, T - len(order)))]
    return [*(_spread(rows, values[name], T) for name in (*ALWAYS, *head.outputs)), *extra]


def backward(  # type: ignore[no-untyped-def]
    grad_logps, hidden_states, lm_head_weight, bias, labels, lse_whole, lse_rest, kept, order, needed, *settings
):
    """The needed gradients among dH (T, H), dW (V, H) and db (V,), each in its input's dtype."""
    settings = Settings(*settings)
    head, dtype, T = settings.head, settings.dtype, labels.shape[0]
    impl = resolve_impl(settings.impl, hidden_states.device, dtype)
    engine = engine_of(impl, head.shard)
    inputs = (hidden_states, lm_head_weight, bias)
    grad_dtypes = [x.dtype if wanted else None for x, wanted in zip(inputs, needed, strict=True)]
    if head.shard is not None:
        labels = head.shard.local(labels)
        if needed[0]:  # summed over the processes before it is rounded
            grad_dtypes[0] = accumulator_dtype(dtype)
    scale = row_scale(grad_logps, lse_rest, labels, head)
    rows = None
    if impl == "tiled" and labels.device.type == "cpu":
        # Rows with an upstream gradient of exactly zero are dropped: ignored rows, and pairs whose loss is settled.
        # With skipped tiles, blocks must match the rows that forward kept, so only ignored rows are dropped.
        rows = _rows_where(scale != 0 if kept is None else labels != IGNORE_INDEX)
    if order is not None:
        rows = order if rows is None else rows[order[: len(rows)]]
    hidden_states, labels, lse_whole, lse_rest, scale = _take(rows, hidden_states, labels, lse_whole, lse_rest, scale)
    with torch.autocast(hidden_states.device.type, enabled=False):
        args = (hidden_states.to(dtype), lm_head_weight.to(dtype), None if bias is None else bias.to(dtype), labels)
        lse = SplitLse(lse_whole, lse_rest)
        if kept is None:
            logit_grads = engine.logit_grads(*args, lse, head, scale)
            grads = head_gradients(logit_grads, args[0], args[1], *grad_dtypes)
        else:
            grads = engine.skipping_gradients(*args, lse, head, scale, kept, *grad_dtypes)
    grad_hidden, *others = grads
    if grad_hidden is not None:
        grad_hidden = _spread(rows, grad_hidden, T)
        if head.shard is not None:
            grad_hidden = head.shard.reduce(grad_hidden).to(inputs[0].dtype)
    return [grad for grad in (grad_hidden, *others) if grad is not None]


def scale_rows(unit_grad, grad_logps, dtype):  # type: ignore[no-untyped-def]
    """dH of a frozen head. The operator has no derivative, so that a second derivative raises."""
    return (unit_grad * grad_logps[:, None]).to(dtype)


_forward_op = torch.library.custom_op(
    "fastdpo::linear_logps",
    forward,
    mutates_args=(),
    schema=f"({_INPUTS}, bool grad_in_forward, {_SETTINGS}) -> Tensor[]",
)
_backward_op = torch.library.custom_op(
    "fastdpo::linear_logps_backward",
    backward,
    mutates_args=(),
    schema=f"(Tensor grad_logps, {_INPUTS}, Tensor lse_whole, Tensor lse_rest, Tensor? kept, Tensor? order, "
    f"bool[] needed, {_SETTINGS}) -> Tensor[]",
)

_scale_op = torch.library.custom_op(
    "fastdpo::scale_rows",
    scale_rows,
    mutates_args=(),
    schema="(Tensor unit_grad, Tensor grad_logps, ScalarType dtype) -> Tensor",
)
_scale_op.register_fake(lambda unit_grad, grad_logps, dtype: unit_grad.new_empty(unit_grad.shape, dtype=dtype))


@_forward_op.register_fake
def _(hidden_states, lm_head_weight, bias, labels, grad_in_forward, *settings):  # type: ignore[no-untyped-def]
    settings = Settings(*settings)
    head, dtype = settings.head, accumulator_dtype(settings.dtype)
    values = [
        labels.new_empty(labels.shape, dtype=torch.bool if name == "is_top1" else dtype)
        for name in (*ALWAYS, *head.outputs)
    ]
    if grad_in_forward:
        values.append(hidden_states.new_empty(hidden_states.shape, dtype=dtype))
    if head.skip_tolerance > 0:
        engine = engine_of(resolve_impl(settings.impl, hidden_states.device, settings.dtype))
        block_rows, block_vocab = engine.skip_blocks(hidden_states)
        kept_shape = (-(-hidden_states.shape[0] // block_rows), -(-lm_head_weight.shape[0] // block_vocab))
        values += [labels.new_empty(kept_shape, dtype=torch.bool), labels.new_empty(labels.shape)]
    return values


@_backward_op.register_fake
def _(grad_logps, hidden_states, lm_head_weight, bias, *rest):  # type: ignore[no-untyped-def]
    needed = rest[-len(Settings._fields) - 1]
    inputs = (hidden_states, lm_head_weight, bias)
    return [x.new_empty(x.shape) for x, wanted in zip(inputs, needed, strict=True) if wanted]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    hidden_states, lm_head_weight, bias, labels, grad_in_forward, *settings = inputs
    ctx.set_materialize_grads(False)
    ctx.settings, ctx.grad_in_forward = Settings(*settings), grad_in_forward
    _, lse_whole, lse_rest, *rest = output
    extra = rest[len(ctx.settings.head.outputs) :]
    if grad_in_forward:
        ctx.hidden_dtype = hidden_states.dtype
        ctx.save_for_backward(*extra)
    else:
        # Saves the originals, not the casts: under autocast a second copy of the head would live until backward.
        kept, order = extra or (None, None)
        ctx.save_for_backward(hidden_states, lm_head_weight, bias, labels, lse_whole, lse_rest, kept, order)


def _grads(ctx: Any, grad_outputs: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    grad_logps = grad_outputs[0]
    grads: list[Tensor | None] = [None, None, None]
    if grad_logps is not None and ctx.grad_in_forward:
        grads[0] = torch.ops.fastdpo.scale_rows(ctx.saved_tensors[0], grad_logps, ctx.hidden_dtype)
    elif grad_logps is not None:
        needed = list(ctx.needs_input_grad[:3])
        found = iter(torch.ops.fastdpo.linear_logps_backward(grad_logps, *ctx.saved_tensors, needed, *ctx.settings))
        grads = [next(found) if wanted else None for wanted in needed]
    return (*grads, *[None] * (len(ctx.needs_input_grad) - 3))


_forward_op.register_autograd(_grads, setup_context=_save)


def _rows_where(keep: Tensor) -> Tensor | None:
    """Indices of the kept rows; None if all rows are kept."""
    rows = keep.nonzero()[:, 0]
    return None if rows.shape[0] == keep.shape[0] else rows


def _take(rows: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tensors if rows is None else tuple(x[rows] for x in tensors)


def _spread(rows: Tensor | None, x: Tensor, num_rows: int) -> Tensor:
    """`x` scattered to its rows among `num_rows`, zeros elsewhere."""
    return x if rows is None else x.new_zeros(num_rows, *x.shape[1:]).index_copy_(0, rows, x)
