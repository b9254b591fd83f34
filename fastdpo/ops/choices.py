"""The head op for several labels per row and for a differentiable entropy, in pure PyTorch on any device.

In: arguments that `linear_logps` has validated, with labels (T, K). Out: TokenLogps with logps (T, K), and an entropy
that has a gradient if requested. Backward makes the logits again, tile by tile; only numbers per row and label are
kept. Refuses labels outside the vocabulary on the CPU (on a GPU they give nan), and a second derivative.
Equation numbers are those of kernels/README.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastdpo.ops.gradients import head_gradients
from fastdpo.ops.head import Head
from fastdpo.ops.matmul import operand
from fastdpo.ops.tiled import (
    EXP_FLOOR,
    RowState,
    choose_tiling,
    fill_logits,
    label_columns,
    logit_tiles,
    scratch_of,
    tile_of,
)
from fastdpo.types import IGNORE_INDEX, TokenLogps


def choice_logps(
    hidden_states: Tensor,  # (T, H)
    lm_head_weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (T, K) int64
    head: Head,
    dtype: torch.dtype,  # of the matmuls' operands
) -> TokenLogps:
    logps, *statistics = _Choices.apply(hidden_states, lm_head_weight, bias, labels, head, dtype)
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
        dtype: torch.dtype,
    ) -> tuple[Tensor, ...]:
        with torch.autocast(hidden_states.device.type, enabled=False):
            args = (hidden_states.to(dtype), lm_head_weight.to(dtype), None if bias is None else bias.to(dtype))
            values = _forward(*args, labels, head)
        ctx.head, ctx.dtype = head, dtype
        ctx.set_materialize_grads(False)
        saved = (values["lse_whole"], values["lse_rest"], values["entropy"])
        ctx.save_for_backward(hidden_states, lm_head_weight, bias, labels, *saved)
        statistics = [values[name] for name in head.outputs]
        with_grad = {"entropy"} if head.entropy_grad else set()
        ctx.mark_non_differentiable(*(values[name] for name in head.outputs if name not in with_grad))
        return values["logps"], *statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden_states, lm_head_weight, bias, labels, lse_whole, lse_rest, entropy = ctx.saved_tensors
        grad_entropy = None
        if ctx.head.entropy_grad:
            grad_entropy = upstream[1 + ctx.head.outputs.index("entropy")]
        inputs, needed = (hidden_states, lm_head_weight, bias), ctx.needs_input_grad
        wanted = [x.dtype if need else None for x, need in zip(inputs, needed, strict=False)]
        dtype = ctx.dtype
        with torch.autocast(hidden_states.device.type, enabled=False):
            args = (hidden_states.to(dtype), lm_head_weight.to(dtype), None if bias is None else bias.to(dtype))
            tiles = _ChoiceGrads(*args, labels, lse_whole, lse_rest, entropy, upstream[0], grad_entropy, ctx.head)
            return *head_gradients(tiles, *args[:2], *wanted), None, None, None


def _forward(
    hidden_states: Tensor, lm_head_weight: Tensor, bias: Tensor | None, labels: Tensor, head: Head
) -> dict[str, Tensor]:
    """logps (T, K), and per row lse_whole, lse_rest, entropy (empty unless it has a gradient) and head.outputs."""
    tiling = choose_tiling(hidden_states, lm_head_weight, head.workspace_bytes)
    any_label = labels.amax(1)  # IGNORE_INDEX is below all ids
    state = RowState(hidden_states, lm_head_weight, any_label, head)
    chosen = state.max.new_full(labels.shape, torch.nan)  # stays nan for a label outside the vocabulary
    scratch = scratch_of(tiling, state.max)
    second = scratch_of(tiling, state.max) if "entropy" in head.outputs else None
    for rows, vocab, logits in logit_tiles(hidden_states, lm_head_weight, bias, head, tiling, scratch):
        column, inside = label_columns(labels[rows], vocab)
        chosen[rows] = torch.where(inside, logits.gather(1, column), chosen[rows])
        state.absorb(rows, vocab, logits, None if second is None else tile_of(second, rows, vocab))
    values = state.finish()
    ignored = labels == IGNORE_INDEX
    logps = (chosen - state.max[:, None]) - state.sumexp.log()[:, None]  # in the order of eq. (7)
    values["logps"] = logps.masked_fill(ignored, 0.0)
    if "is_top1" in head.outputs:
        values["is_top1"] = (chosen >= state.max[:, None]) & ~ignored
    return {"entropy": logps.new_zeros(0), **values}


class _ChoiceGrads:
    """Fills tiles of the logits' gradient, eq. (22), by recomputing the logits."""

    row_scale: Tensor | None = None  # in the tiles

    def __init__(
        self,
        hidden_states: Tensor,
        lm_head_weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        lse_whole: Tensor,
        lse_rest: Tensor,
        entropy: Tensor,
        grad_logps: Tensor | None,  # (T, K)
        grad_entropy: Tensor | None,  # (T,)
        head: Head,
    ):
        self.tiling = choose_tiling(hidden_states, lm_head_weight, head.workspace_bytes)
        self.hidden_states, self.bias, self.labels, self.head = hidden_states, bias, labels, head
        ignored = labels == IGNORE_INDEX  # (T, K)
        grads = lse_whole.new_zeros(labels.shape) if grad_logps is None else grad_logps.masked_fill(ignored, 0.0)
        slope = lse_whole.new_zeros(lse_whole.shape) if grad_entropy is None else grad_entropy
        slope = slope.masked_fill(ignored.all(1), 0.0)
        self.unit: Tensor | None = None
        if hidden_states.dtype == torch.float16:  # fp16 keeps its range
            largest = torch.cat([grads.abs().flatten(), slope.abs(), slope.new_zeros(1)]).amax(0, keepdim=True)
            self.unit = torch.where(largest > 0, largest.log2().floor().exp2(), 1.0)
            grads, slope = grads / self.unit, slope / self.unit
        self.grads, self.slope = grads, slope
        self.offset = grads.sum(1) if grad_entropy is None else grads.sum(1) + slope * entropy
        wrong = (~ignored & ((labels < 0) | (labels >= lm_head_weight.shape[0]))).any(1)
        # exp(z - inf) = 0: an ignored row has no probabilities; a label outside the vocabulary makes its row nan
        self.lse_whole = lse_whole.masked_fill(ignored.all(1), torch.inf).masked_fill(wrong, torch.nan)
        self.lse_rest = lse_rest
        self.scratch, self.second = scratch_of(self.tiling, lse_whole), scratch_of(self.tiling, lse_whole)
        self.third = scratch_of(self.tiling, lse_whole) if head.softcap is not None else None

    def tile(self, rows: slice, vocab: slice, weight: Tensor) -> Tensor:
        """(block_rows, block_vocab), valid until the next call, in the dtype of `weight`, the operand of W[vocab]."""
        log_p, out = tile_of(self.second, rows, vocab), tile_of(self.scratch, rows, vocab)
        cap_slope = None if self.third is None else tile_of(self.third, rows, vocab)
        bias = None if self.bias is None else self.bias[vocab]
        fill_logits(log_p, operand(self.hidden_states[rows]), weight.T, bias, self.head, cap_slope)
        log_p.sub_(self.lse_whole[rows, None]).sub_(self.lse_rest[rows, None])
        torch.exp(log_p, out=out).neg_()
        factor = log_p.clamp_(min=EXP_FLOOR).mul_(self.slope[rows, None]).add_(self.offset[rows, None])
        out.mul_(factor)
        column, inside = label_columns(self.labels[rows], vocab)
        out.scatter_add_(1, column, self.grads[rows] * inside)  # an id that a row names twice counts twice
        if cap_slope is not None:
            out.mul_(cap_slope)
        return out.mul_(self.head.logit_scale).to(weight.dtype)
