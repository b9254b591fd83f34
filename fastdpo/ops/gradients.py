"""dH, dW and db from tiles of the logits' gradient, for any engine that fills the tiles.

With D of eq. (9) and the row factors c of eq. (10), (11) and (12) are dH = c (D @ W), dW = D.T @ (c H), db = D.T @ c.
An engine applies c where this is cheapest: in its tiles, relative to a common unit, or here, to the rows.

The outer loop runs over the vocabulary and the inner loop over rows, so a block of dW is finished before the next one
starts: it is summed in fp32 in one block of scratch and cast once. Only requested gradients are allocated and computed.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fastdpo.ops.head import Tiling
from fastdpo.ops.matmul import accumulator_dtype, matmul_into, operand


class LogitGrads(Protocol):
    """Recomputes the logits' gradient tile by tile."""

    tiling: Tiling
    row_scale: Tensor | None  # (T,) c, where tiles are D; None where they are c D / unit
    unit: Tensor | None  # (1,); None: 1

    def tile(self, rows: slice, vocab: slice, weight: Tensor) -> Tensor:
        """(block_rows, block_vocab), in the dtype of `weight`, which is operand(W[vocab])."""


def head_gradients(
    logit_grads: LogitGrads,
    hidden_states: Tensor,  # (T, H)
    lm_head_weight: Tensor,  # (V, H)
    hidden_dtype: torch.dtype | None,  # of dH; None: not wanted
    weight_dtype: torch.dtype | None,  # of dW
    bias_dtype: torch.dtype | None,  # of db
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    tiling, scale = logit_grads.tiling, logit_grads.row_scale
    acc_dtype = accumulator_dtype(hidden_states.dtype)
    device = hidden_states.device
    grad_hidden = grad_weight = grad_bias = None
    if hidden_dtype is not None:
        grad_hidden = torch.empty(hidden_states.shape, dtype=acc_dtype, device=device)
    if weight_dtype is not None:
        grad_weight = torch.empty(lm_head_weight.shape, dtype=weight_dtype, device=device)
        block_shape = (tiling.block_vocab, lm_head_weight.shape[1])
        scratch = None if weight_dtype == acc_dtype else torch.empty(block_shape, dtype=acc_dtype, device=device)
    if bias_dtype is not None:
        grad_bias = torch.zeros(lm_head_weight.shape[0], dtype=acc_dtype, device=device)

    for vocab in tiling.vocab():
        weight = operand(lm_head_weight[vocab])
        if grad_weight is not None:
            block = grad_weight[vocab] if scratch is None else scratch[: weight.shape[0]]
        for rows in tiling.rows():
            d = logit_grads.tile(rows, vocab, weight)
            if grad_hidden is not None:
                matmul_into(grad_hidden[rows], d, weight, beta=0.0 if vocab.start == 0 else 1.0)
            if grad_weight is not None:
                scaled = hidden_states[rows] if scale is None else hidden_states[rows] * scale[rows, None]
                matmul_into(block, d.T, scaled.to(weight.dtype), beta=0.0 if rows.start == 0 else 1.0)
            if grad_bias is not None:
                grad_bias[vocab] += d.sum(0, dtype=acc_dtype) if scale is None else scale[rows] @ d.to(acc_dtype)
        if grad_weight is not None:
            _finish(block, logit_grads.unit, grad_weight[vocab])
        del weight  # where it is a cast, before the next one is made
    if grad_weight is not None and tiling.num_rows == 0:
        grad_weight.zero_()
    if grad_hidden is not None and scale is not None:
        grad_hidden.mul_(scale[:, None])
    return (
        None if grad_hidden is None else _finish(grad_hidden, logit_grads.unit, dtype=hidden_dtype),
        grad_weight,
        None if grad_bias is None else _finish(grad_bias, logit_grads.unit, dtype=bias_dtype),
    )


def _finish(sums: Tensor, unit: Tensor | None, out: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """`unit * sums` in `out` or as a tensor of `dtype`, rounded once; in place if possible."""
    if out is None:
        out = sums if sums.dtype == dtype else torch.empty_like(sums, dtype=dtype)
    if unit is not None:
        return torch.mul(sums, unit, out=out)
    return out if out.data_ptr() == sums.data_ptr() else out.copy_(sums)
