"""Masks for models that want one: what their own mask functions would make of a packed row.

transformers asks the attention in use for its mask, with a function that says what a layer limits attention to. Most
models hand the layout of a packed row on to their attention, and are given no mask at all. The others are given, in
this order, what suffices:

token    a mask of the right shape without storage, which carries the layout and the layer's limits. Layers that drop
         other arguments, or limit attention in the mask alone, bring it back to `packed_attention`.
whole    a (1, 1, T, T) bias for layers that add it to logits of their own, as those of eager attention do.

Which of the two a model needs the self-check finds out by trying. Refused: limits that are none of ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fastdpo.modeling.attention.call import PackedLayout

MASKS = ("none", "token", "whole")
# Functions of transformers.masking_utils, by where they are defined, and the variable that holds a limit
_LIMITS = {"sliding_window_overlay": ("window", "sliding_window"), "chunked_overlay": ("chunk", "chunk_size")}
_NO_LIMITS = (
    *("causal_mask_function", "and_masks", "or_masks", "packed_sequence_mask_function"),
    *("remap_positions_for_packed_sequence", "padding_mask_function", "add_offsets_to_mask_function"),
)


@dataclass(frozen=True, eq=False)
class Carried:
    """What a mask says of a packed row."""

    layout: PackedLayout
    window: int | None = None  # tokens a query sees, itself included
    chunk: int | None = None  # tokens see those of their own chunk of so many positions


# What masks carry, by the storage that they are views of: layers that are run again in backward get another tensor
# over it. A weak reference keeps the number of a storage from being given to another.
_by_storage: dict[int, tuple[StorageWeakRef, Carried]] = {}
_row: ContextVar[PackedLayout | None] = ContextVar("packed_row", default=None)


def masks_of(layout: PackedLayout | None) -> AbstractContextManager[None]:
    """A context in which masks that are asked for are those of this row."""
    return nullcontext() if layout is None or layout.masks == "none" else _asked_of(layout)


@contextmanager
def _asked_of(layout: PackedLayout) -> Iterator[None]:
    token = _row.set(layout)
    try:
        yield
    finally:
        _row.reset(token)


def carried(mask: Tensor | None) -> Carried | None:
    """What a mask carries, or one that it is a view of; None where it is none of ours."""
    if mask is None or not _by_storage:
        return None
    _, about = _by_storage.get(mask.untyped_storage()._cdata, (None, None))
    return about


def _carrying(mask: Tensor, about: Carried) -> Tensor:
    for number in [number for number, (storage, _) in _by_storage.items() if storage.expired()]:
        del _by_storage[number]
    storage = mask.untyped_storage()
    _by_storage[storage._cdata] = (StorageWeakRef(storage), about)
    return mask


def copied(tensor: Tensor) -> Tensor:
    """A clone, which carries what the tensor does."""
    about = carried(tensor)
    return tensor.clone() if about is None else _carrying(tensor.clone(), about)


def only_picked(mask: Tensor | None, indices: Tensor) -> Tensor:
    """The bias (1, 1, T, T) of a sparse layer, which sees the keys in rows `indices` (1, T, k) and no others.

    Raises:
        ValueError: there is no whole mask, without which other sequences' keys would have been among them.
    """
    about = carried(mask)
    if mask is None or about is None or about.layout.masks != "whole":
        raise ValueError("packed attention does not implement indices without a whole mask")
    others = torch.ones(mask.shape, dtype=torch.bool, device=mask.device).scatter(-1, indices.long()[:, None], False)
    return mask.masked_fill(others, torch.finfo(mask.dtype).min)


def packed_mask(
    q_length: int = 0,
    kv_length: int = 0,
    mask_function: Any = None,
    dtype: torch.dtype = torch.float32,
    device: Any = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """Mask function for transformers' AttentionMaskInterface.

    Raises:
        ValueError: the layer limits attention by something else than a window or chunks.
    """
    layout = _row.get()
    if layout is None:
        return None
    about = Carried(layout, **limits_of(mask_function))
    if layout.masks == "token":
        mask = torch.full((), float("nan"), dtype=dtype, device=device).expand(1, 1, q_length, kv_length)
    else:
        mask = layout.bias(about.window, about.chunk, dtype).view(1, 1, q_length, kv_length)
    return _carrying(mask, about)


def limits_of(function: Any) -> dict[str, int]:
    """The window and the chunk that a mask function of transformers limits attention to.

    Raises:
        ValueError: it does something else besides.
    """
    limits: dict[str, int] = {}
    todo = [function]
    while todo:
        function = todo.pop()
        origin = getattr(function, "__qualname__", repr(function)).partition(".")[0]
        inner = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
        if origin in _LIMITS:
            limit, variable = _LIMITS[origin]
            limits[limit] = dict(zip(function.__code__.co_freevars, inner, strict=True))[variable]
        elif origin not in _NO_LIMITS:
            raise ValueError(f"packed attention does not implement masks that {origin} makes")
        for value in inner:
            todo += [part for part in (value if isinstance(value, tuple) else (value,)) if callable(part)]
    return limits
