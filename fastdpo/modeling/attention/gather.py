"""Rows of keys or values in, the same in the order of variable-length attention out: every branch after its prefix.

In backward a row gets the sum of its own gradient and those of its copies, in fp32 and always in the same order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdpo.types import VarlenLayout


def gather_keys(rows: Tensor, layout: VarlenLayout) -> Tensor:
    """(T, ...) -> (K, ...); `rows` itself where no prefix is shared."""
    if not layout.copy_ends:
        return rows
    indices = (layout.key_rows, layout.own_keys, layout.copied_keys)
    return _GatherKeys.apply(rows, *indices, layout.copy_ends)  # type: ignore[no-any-return,no-untyped-call]


class _GatherKeys(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, key_rows: Tensor, own_keys: Tensor, copied_keys: Tensor, copy_ends: tuple[int, ...]
    ) -> Tensor:
        ctx.save_for_backward(key_rows, own_keys, copied_keys)
        ctx.copy_ends = copy_ends
        return rows.index_select(0, key_rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        key_rows, own_keys, copied_keys = ctx.saved_tensors
        total = grad.index_select(0, own_keys).to(torch.promote_types(grad.dtype, torch.float32))
        start = 0
        for end in ctx.copy_ends:
            keys = copied_keys[start:end]  # no two are of one row: each sum has two terms, and one order
            total.index_add_(0, key_rows[keys], grad.index_select(0, keys).to(total.dtype))
            start = end
        return total.to(grad.dtype), None, None, None, None
