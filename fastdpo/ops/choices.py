"""The head op for several labels per row, and for an lse or entropy with a gradient.

In: arguments that `linear_logps` has validated, with labels (T, K). Out: TokenLogps with logps (T, K), and an lse and
entropy that have a gradient if requested. Backward makes the logits again, tile by tile; only numbers per row and label
are kept. Refuses a second derivative.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastdpo.ops.engine import engine_of, resolve_impl
from fastdpo.ops.gradients import head_gradients
from fastdpo.ops.head import Head, SplitLse, choice_rows
from fastdpo.types import TokenLogps


def choice_logps(
    hidden_states: Tensor,  # (T, H)
    lm_head_weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (T, K) int64
    head: Head,
    impl: str,
    dtype: torch.dtype,  # of the matmuls' operands
) -> TokenLogps:
    impl = resolve_impl(impl, hidden_states.device, dtype)
    logps, *statistics = _Choices.apply(hidden_states, lm_head_weight, bias, labels, head, impl, dtype)
    values = dict(zip(head.outputs, statistics, strict=True))
    return TokenLogps(logps, **values)


class _Choices(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden_states: Tensor,
        lm_head_weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        head: Head,
        impl: str,
        dtype: torch.dtype,
    ) -> tuple[Tensor, ...]:
        with torch.autocast(hidden_states.device.type, enabled=False):
            args = (hidden_states.to(dtype), lm_head_weight.to(dtype), None if bias is None else bias.to(dtype))
            values = engine_of(impl).choice_forward(*args, labels, head)
        ctx.head, ctx.impl, ctx.dtype = head, impl, dtype
        ctx.set_materialize_grads(False)
        saved = (values["lse_whole"], values["lse_rest"], values.get("entropy"))
        ctx.save_for_backward(hidden_states, lm_head_weight, bias, labels, *saved)
        statistics = [values[name] for name in head.outputs]
        ctx.mark_non_differentiable(*(values[name] for name in head.outputs if name not in head.output_grads))
        return values["logps"], *statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_states, lm_head_weight, bias, labels, lse_whole, lse_rest, entropy = ctx.saved_tensors
        grad_logps, *others = upstream
        of_output = dict(zip(ctx.head.outputs, others, strict=True))  # None without a gradient
        inputs, needed = (hidden_states, lm_head_weight, bias), ctx.needs_input_grad
        wanted = [x.dtype if need else None for x, need in zip(inputs, needed, strict=False)]
        dtype = ctx.dtype
        with torch.autocast(hidden_states.device.type, enabled=False):
            args = (hidden_states.to(dtype), lm_head_weight.to(dtype), None if bias is None else bias.to(dtype))
            lse, num_vocab = SplitLse(lse_whole, lse_rest), lm_head_weight.shape[0]
            of_outputs = (of_output.get("lse"), of_output.get("entropy"), entropy)
            rows = choice_rows(grad_logps, *of_outputs, lse, labels, num_vocab, dtype)
            tiles = engine_of(ctx.impl).choice_grads(*args, labels, rows, ctx.head)
            return *head_gradients(tiles, *args[:2], *wanted), None, None, None, None
