"""Corrects layers that use row numbers as positions, because in a packed row the two differ.

Most models pass `position_ids` to all layers that need positions. Three kinds do not: tables of learned positions that
count the rows of their input by default (BART and its relatives), which get `position_ids` here; linear biases (alibi:
Bloom, Falcon, MPT), whose column of each key is that of the key's row; and Llama 4's layers without rotary positions,
which scale their queries by the row number.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# Arguments of layers that hold a bias (..., heads, 1, L) with a column for each key
_BIASES = ("alibi", "position_bias")
_SHORT_SCALE = 4  # positions after which a scale grows, while models are compared on short rows


def counting_modules(backbone: nn.Module) -> list[str]:
    """Names of the modules that use row numbers as positions unless `told_positions` tells them."""
    return [*counting_tables(backbone), *layers_with_counting_biases(backbone)]


def counting_tables(backbone: nn.Module) -> list[str]:
    """Names of the position tables that accept `position_ids` and count rows without it."""
    return [
        name
        for name, module in backbone.named_modules()
        if isinstance(module, nn.Embedding) and "position_ids" in _parameters(module)[1:]
    ]


def layers_with_counting_biases(backbone: nn.Module) -> list[str]:
    """Names of the outermost modules that take a linear bias from the backbone."""
    found: list[str] = []
    for name, module in backbone.named_modules():  # the outermost come first
        is_inside = any(name.startswith(f"{outer}.") for outer in found)
        if name and not is_inside and not set(_BIASES).isdisjoint(_parameters(module)):
            found.append(name)
    return found


@contextmanager
def told_positions(backbone: nn.Module, names: Sequence[str], position_ids: Tensor | None) -> Iterator[None]:
    """Context manager in which the named tables and layers of the backbone use these positions (1, T)."""
    told: list[Tensor] = []

    def tell(module: nn.Module, args: Any, kwargs: Any) -> Any:
        assert position_ids is not None
        parameters = _parameters(module)
        if "position_ids" in parameters and isinstance(module, nn.Embedding):
            return args[: parameters.index("position_ids")], {**kwargs, "position_ids": position_ids[0]}
        for bias in (kwargs.get(name) for name in _BIASES):
            if _is_counting(bias) and not any(bias is other for other in told):
                # in place: all layers share it, and gradient checkpointing runs them again with the same tensor
                bias.data = bias.index_select(-1, position_ids[0])
                told.append(bias)
        return None

    names = [] if position_ids is None else names
    modules = [backbone.get_submodule(name) for name in names]
    handles = [module.register_forward_pre_hook(tell, with_kwargs=True, prepend=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_counting(bias: Any) -> bool:
    """Whether a bias is the same for all queries, so that it says nothing but where a key is."""
    return isinstance(bias, Tensor) and bias.dim() >= 3 and bias.shape[-2] == 1 and not bias.requires_grad


def scaled_by_position(module: Any, query: Tensor, layout: Any) -> Tensor:
    """Rescales queries (1, heads, T, D) from the layer's scale by row number to the scale by position."""
    if not getattr(module, "attn_temperature_tuning", False) or getattr(module, "use_rope", True):
        return query
    rows = torch.arange(query.shape[2], device=query.device)
    by_row, by_position = (
        torch.log1p(torch.floor((numbers.float() + 1.0) / module.floor_scale)) * module.attn_scale + 1.0
        for numbers in (rows, layout.own_positions())
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
