"""Finds the tensors in a module's arguments and outputs that hold a packed row, and replaces only these."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor


def has_rows(value: Any, num_rows: int) -> bool:
    """Whether a tensor is (1, T, ...)."""
    return isinstance(value, Tensor) and value.dim() >= 2 and tuple(value.shape[:2]) == (1, num_rows)


def is_mask(value: Any, num_rows: int) -> bool:
    """Whether a tensor is (1, heads, T, T)."""
    is_square = isinstance(value, Tensor) and value.dim() == 4 and tuple(value.shape[2:]) == (num_rows, num_rows)
    return is_square and value.shape[0] == 1


def is_table(value: Any, num_rows: int) -> bool:
    """Whether a tensor is (T, T) whole numbers, such as distances, that depend on the numbers of rows alone."""
    is_square = isinstance(value, Tensor) and tuple(value.shape) == (num_rows, num_rows)
    return is_square and not value.is_floating_point()


def mapped(value: Any, function: Callable[[Any], Any], kind: type = Tensor) -> Any:
    """The arguments with `function` applied to every matching value in them."""
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, tuple | list):
        return type(value)(mapped(part, function, kind) for part in value)
    if type(value) is dict:
        return {name: mapped(part, function, kind) for name, part in value.items()}
    return value


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple | list):
        for part in value:
            yield from leaves(part)
    elif isinstance(value, Mapping):
        yield from leaves(list(value.values()))
    else:
        yield value
