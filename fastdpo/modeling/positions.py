"""Corrects layers that use row numbers as positions, because in a packed row the two differ.

Most models pass `position_ids` to all layers that need positions. Two kinds do not: tables of learned positions that
count the rows of their input by default (BART and its relatives), which get `position_ids` here; and Llama 4's layers
without rotary positions, which scale their queries by the row number.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_SHORT_SCALE = 4  # positions after which a scale grows, while models are compared on short rows


def counting_tables(backbone: nn.Module) -> list[str]:
    """Names of the position tables that accept `position_ids` and count rows without it."""
    return [
        name
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Embedding) and "position_ids" in _parameters(module)[1:]
    ]


@contextmanager
def told_positions(tables: list[nn.Module], position_ids: Tensor | None) -> Iterator[None]:
    """Context manager in which the tables use these positions (1, T)."""

    def tell(module: nn.Module, args: Any, kwargs: Any) -> Any:
        place = _parameters(module).index("position_ids")
        return args[:place], {**kwargs, "position_ids": position_ids[0]}  # type: ignore[index]

    tables = [] if position_ids is None else tables
    handles = [table.register_forward_pre_hook(tell, with_kwargs=True) for table in tables]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def scaled_by_position(module: Any, query: Tensor, layout: Any) -> Tensor:
    """Rescales queries (1, heads, T, D) from the layer's scale by row number to the scale by position."""
    if not getattr(module, "attn_temperature_tuning", False) or getattr(module, "use_rope", True):
        return query
    rows = torch.arange(query.shape[2], device=query.device)
    by_row, by_position = (
        torch.log1p(torch.floor((numbers.float() + 1.0) / module.floor_scale)) * module.attn_scale + 1.0
        for numbers in (rows, layout.positions())
    )
    return (query * (by_position / by_row)[:, None]).to(query.dtype)


@contextmanager
def short_scales(model: nn.Module) -> Iterator[None]:
    """Context manager in which scales grow after a few positions instead of thousands, for short tests."""
    changed = [(m, m.floor_scale) for m in model.modules() if isinstance(getattr(m, "floor_scale", None), int | float)]
    for module, _ in changed:
        module.floor_scale = _SHORT_SCALE  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, value in changed:
            module.floor_scale = value


def _parameters(module: nn.Module) -> list[str]:
    """Names of the arguments of a module's forward."""
    return list(inspect.signature(type(module).forward).parameters)[1:]
