"""The autograd node of the fast implementations. It keeps (T,) numbers, never logits; backward recomputes tiles.

In: validated tensors and the name of an engine. Out: per-row tensors, of which only `logps` is differentiable. Backward
computes the gradients that `ctx.needs_input_grad` asks for and no others: a frozen head costs no dW.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastdpo.ops.gradients import LogitGrads, head_gradients
from fastdpo.ops.head import Head, SplitLse
from fastdpo.types import IGNORE_INDEX, TokenLogps


class Engine(NamedTuple):
    """What an implementation brings: the forward pass, and a maker of tiles of the logits' gradient."""

    forward: Callable[..., dict[str, Tensor]]  # (hidden_states, lm_head_weight, bias, labels, head)
    logit_grads: Callable[..., LogitGrads]  # (hidden_states, lm_head_weight, bias, labels, lse, head)


def differentiable_logps(
    hidden_states: Tensor,  # (T, H)
    lm_head_weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (T,) int64
    head: Head,
    engine: Engine,
    dtype: torch.dtype,  # of the matmuls' operands: the inputs' own, or autocast's
) -> TokenLogps:
    logps, *statistics = _LinearLogps.apply(hidden_states, lm_head_weight, bias, labels, head, engine, dtype)
    return TokenLogps(logps, **dict(zip(head.outputs, statistics, strict=True)))


class _LinearLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_states, lm_head_weight, bias, labels, head, engine, dtype):  # type: ignore[override]
        with torch.autocast(hidden_states.device.type, enabled=False):
            bias_cast = None if bias is None else bias.to(dtype)
            values = engine.forward(hidden_states.to(dtype), lm_head_weight.to(dtype), bias_cast, labels, head)
        # Saves the originals, not the casts: under autocast a second copy of the head would live until backward.
        ctx.save_for_backward(hidden_states, lm_head_weight, bias, labels, values["lse_whole"], values["lse_rest"])
        ctx.head, ctx.engine, ctx.dtype = head, engine, dtype
        statistics = tuple(values[name] for name in head.outputs)
        ctx.mark_non_differentiable(*statistics)
        return (values["logps"], *statistics)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps, *_):  # type: ignore[override]
        hidden_states, lm_head_weight, bias, labels, *lse = ctx.saved_tensors
        inputs = (hidden_states, lm_head_weight, bias)
        grad_dtypes = [x.dtype if needed else None for x, needed in zip(inputs, ctx.needs_input_grad, strict=False)]
        with torch.autocast(hidden_states.device.type, enabled=False):
            hidden_cast, weight_cast = hidden_states.to(ctx.dtype), lm_head_weight.to(ctx.dtype)
            bias_cast = None if bias is None else bias.to(ctx.dtype)
            lse = SplitLse(*lse)
            row_scale = grad_logps * -ctx.head.logit_scale * torch.exp(-lse.rest)
            row_scale.masked_fill_(labels == IGNORE_INDEX, 0.0)
            logit_grads = ctx.engine.logit_grads(hidden_cast, weight_cast, bias_cast, labels, lse, ctx.head)
            grads = head_gradients(logit_grads, hidden_cast, weight_cast, row_scale, *grad_dtypes)
        return (*grads, None, None, None, None)
