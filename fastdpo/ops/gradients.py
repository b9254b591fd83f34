"""dH, dW and db from tiles of the logits' gradient, whoever fills the tiles.

With `D = (softmax(z) - onehot) * exp(lse_rest)` times the derivative of the softcap, and
`c_t = -g_t * logit_scale * exp(-lse_rest_t)`, eq. (9) to (12):

    dH = c * (D @ W)        dW = D.T @ (c * H)        db = D.T @ c

Tiles walk the vocabulary outside and the rows inside, so that a block of dW is finished before the next one starts: it
is summed in fp32 in one block of scratch and cast once. Only the gradients asked for are allocated or computed.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fastdpo.ops.head import Tiling
from fastdpo.ops.matmul import accumulator_dtype, matmul_into, operand


class LogitGrads(Protocol):
    """Something that recomputes logits tile by tile."""

    tiling: Tiling

    def tile(self, rows: slice, vocab: slice, weight: Tensor) -> Tensor:
        """D over the tile, (block_rows, block_vocab), in the dtype of `weight`, which is operand(W[vocab])."""


def head_gradients(
    logit_grads: LogitGrads,
    hidden_states: Tensor,  # (T, H)
    lm_head_weight: Tensor,  # (V, H)
    row_scale: Tensor,  # (T,) c in eq. (10), fp32 or fp64; 0 in ignored rows
    hidden_dtype: torch.dtype | None,  # of dH; None: not wanted
    weight_dtype: torch.dtype | None,  # of dW
    bias_dtype: torch.dtype | None,  # of db
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    tiling = logit_grads.tiling
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
                scaled = (hidden_states[rows] * row_scale[rows, None]).to(weight.dtype)
                matmul_into(block, d.T, scaled, beta=0.0 if rows.start == 0 else 1.0)
            if grad_bias is not None:
                grad_bias[vocab] += row_scale[rows] @ d.to(acc_dtype)
        if grad_weight is not None and scratch is not None:
            grad_weight[vocab] = block
        del weight  # where it is a cast, before the next one is made
    if grad_weight is not None and tiling.num_rows == 0:
        grad_weight.zero_()
    if grad_hidden is not None:
        grad_hidden = grad_hidden.mul_(row_scale[:, None]).to(hidden_dtype)
    return grad_hidden, grad_weight, None if grad_bias is None else grad_bias.to(bias_dtype)
