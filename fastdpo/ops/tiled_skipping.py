"""The gradients without the skipped tiles, in pure PyTorch.

In: the inputs of backward, and a bit per block of SKIP_ROWS rows and tile of SKIP_VOCAB ids. Out: dH, dW, db. The
weight rows that a row block keeps are gathered, which gives a smaller vocabulary. Their number is read back to the
host, which costs nothing on a CPU; the Triton counterpart is `fastdpo.kernels.sparse`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdpo.ops.head import Head, SplitLse
from fastdpo.ops.matmul import accumulator_dtype, matmul_into, operand
from fastdpo.ops.tiled import MAX_TILE_ELEMENTS, MAX_WEIGHT_ELEMENTS, SKIP_ROWS, SKIP_VOCAB, GradRows


def tiled_skipping_gradients(
    hidden_states: Tensor,  # (T, H)
    lm_head_weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (T,) int64
    lse: SplitLse,
    head: Head,
    row_scale: Tensor,  # (T,) c in eq. (10)
    kept: Tensor,  # (at least num_row_blocks, num_tiles) bool
    hidden_dtype: torch.dtype | None,  # of dH; None: not wanted
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dH (T, H), dW (V, H), db (V,), (11) and (12) over the kept tiles; rows of dW that no block keeps are 0."""
    T, V = hidden_states.shape[0], lm_head_weight.shape[0]
    acc_dtype, device = accumulator_dtype(hidden_states.dtype), hidden_states.device
    grads = [
        None if dtype is None else torch.zeros(shape, dtype=acc_dtype, device=device)
        for dtype, shape in (
            (hidden_dtype, hidden_states.shape),
            (weight_dtype, lm_head_weight.shape),
            (bias_dtype, (V,)),
        )
    ]
    grad_hidden, grad_weight, grad_bias = grads
    grad_rows = GradRows(hidden_states, labels, lse, head, V)
    ids = torch.arange(kept.shape[1] * SKIP_VOCAB, device=device).view(-1, SKIP_VOCAB)
    scratch = torch.empty(MAX_TILE_ELEMENTS, dtype=acc_dtype, device=device)
    second = torch.empty_like(scratch) if head.softcap is not None else None
    most_columns = MAX_WEIGHT_ELEMENTS // hidden_states.shape[1]
    for number, start in enumerate(range(0, T, SKIP_ROWS)):
        rows = start + row_scale[start : start + SKIP_ROWS].nonzero()[:, 0]  # nan counts as not zero
        if len(rows) == 0:
            continue
        scaled = hidden_states[rows] * row_scale[rows, None]
        row_grads = torch.zeros(len(rows), hidden_states.shape[1], dtype=acc_dtype, device=device)
        columns = ids[kept[number]].flatten()
        for some in columns[columns < V].split(max(1, min(MAX_TILE_ELEMENTS // len(rows), most_columns))):
            weight = operand(lm_head_weight[some])
            column = torch.searchsorted(some, labels[rows]).clamp_(max=len(some) - 1)
            d, slope = (
                None if x is None else x[: len(rows) * len(some)].view(len(rows), len(some)) for x in (scratch, second)
            )
            assert d is not None
            tile_bias = None if bias is None else bias[some]
            grad_rows.fill(d, rows, weight, tile_bias, column[:, None], some[column] == labels[rows], slope)
            d = d.to(weight.dtype)
            if grad_hidden is not None:
                matmul_into(row_grads, d, weight, beta=1.0)
            if grad_weight is not None:
                product = torch.empty(len(some), weight.shape[1], dtype=acc_dtype, device=device)
                matmul_into(product, d.T, scaled.to(weight.dtype))
                grad_weight.index_add_(0, some, product)
                del product
            if grad_bias is not None:
                grad_bias.index_add_(0, some, row_scale[rows] @ d.to(acc_dtype))
            del weight  # and the product above: before the next ones are made
        if grad_hidden is not None:
            grad_hidden[rows] = row_grads * row_scale[rows, None]
    return tuple(
        None if x is None or dtype is None else x.to(dtype)
        for x, dtype in zip(grads, (hidden_dtype, weight_dtype, bias_dtype), strict=True)
    )  # type: ignore[return-value]
