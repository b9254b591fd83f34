"""Gathers rows of keys or values into the order of variable-length attention: every branch after its prefix.

In backward a row gets the sum of the gradients of all its copies, in fp32 and always in the same order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdpo.types import VarlenLayout


def gather_keys(rows: Tensor, layout: VarlenLayout) -> Tensor:
    """(T, ...) -> (K, ...); returns `rows` itself if no prefix is shared."""
    if layout.key_rows.shape[0] == rows.shape[0]:
        return rows
    indices = (layout.key_rows, layout.row_keys, layout.row_ends)
    return _GatherKeys.apply(rows, *indices)  # type: ignore[no-any-return,no-untyped-call]


class _GatherKeys(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, key_rows: Tensor, row_keys: Tensor, row_ends: Tensor) -> Tensor:
        ctx.save_for_backward(row_keys, row_ends)
        return rows.index_select(0, key_rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        row_keys, row_ends = ctx.saved_tensors
        terms = grad.index_select(0, row_keys).to(torch.promote_types(grad.dtype, torch.float32))
        # sequential within a row; unsafe=True skips the check of our own offsets, which would synchronize
        total = torch.segment_reduce(terms, "sum", offsets=row_ends, initial=0.0, unsafe=True)
        return total.to(grad.dtype), None, None, None
