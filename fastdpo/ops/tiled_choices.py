"""Several labels per row and the gradients of lse and entropy in pure PyTorch, on any device, tile by tile.

In: validated tensors of one dtype. Out: the same as its counterpart in `fastdpo.ops.fused`. A label outside the
vocabulary gives nan. Equation numbers are those of kernels/README.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdpo.ops.head import ChoiceRows, Head
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
from fastdpo.types import IGNORE_INDEX


def tiled_choice_forward(
    hidden_states: Tensor, lm_head_weight: Tensor, bias: Tensor | None, labels: Tensor, head: Head
) -> dict[str, Tensor]:
    """logps (T, K), and per row lse_whole, lse_rest and head.outputs; is_top1 (T, K)."""
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
    return values


class TiledChoiceGrads:
    """Fills tiles of the logits' gradient, eq. (22), by recomputing the logits."""

    row_scale: Tensor | None = None  # in the tiles

    def __init__(
        self,
        hidden_states: Tensor,
        lm_head_weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        rows: ChoiceRows,
        head: Head,
    ):
        self.tiling = choose_tiling(hidden_states, lm_head_weight, head.workspace_bytes)
        self.hidden_states, self.bias, self.labels, self.head = hidden_states, bias, labels, head
        self.rows, self.unit = rows, rows.unit
        self.scratch, self.second = scratch_of(self.tiling, rows.lse.whole), scratch_of(self.tiling, rows.lse.whole)
        self.third = scratch_of(self.tiling, rows.lse.whole) if head.softcap is not None else None

    def tile(self, rows: slice, vocab: slice, weight: Tensor) -> Tensor:
        """(block_rows, block_vocab), valid until the next call, in the dtype of `weight`, the operand of W[vocab]."""
        log_p, out = tile_of(self.second, rows, vocab), tile_of(self.scratch, rows, vocab)
        cap_slope = None if self.third is None else tile_of(self.third, rows, vocab)
        bias = None if self.bias is None else self.bias[vocab]
        fill_logits(log_p, operand(self.hidden_states[rows]), weight.T, bias, self.head, cap_slope)
        log_p.sub_(self.rows.lse.whole[rows, None]).sub_(self.rows.lse.rest[rows, None])
        torch.exp(log_p, out=out).neg_()
        factor = log_p.clamp_(min=EXP_FLOOR).mul_(self.rows.slope[rows, None]).add_(self.rows.offset[rows, None])
        out.mul_(factor)
        column, inside = label_columns(self.labels[rows], vocab)
        out.scatter_add_(1, column, self.rows.grads[rows] * inside)  # an id that a row names twice counts twice
        if cap_slope is not None:
            out.mul_(cap_slope)
        return out.mul_(self.head.logit_scale).to(weight.dtype)
