"""Masks of packed rows for models that need a mask.

transformers asks the attention implementation for its mask, and passes a function that defines the limits of a layer.
Most models pass the layout of a packed row on to their attention and get no mask. The others get the first of these
that works:

token    a mask of the right shape without storage, which carries the layout and the layer's limits. Layers that drop
         other arguments, or limit attention only by the mask, pass it on to `packed_attention`.
whole    a (1, 1, T, T) bias for layers that add it to their own logits, such as those with eager attention.
sequence the same bias, for layers whose attention has more than queries, keys and values of rows (learned biases of
         relative positions, keys of compressed tokens). They run over prefix and branch, one sequence at a time and
         with the model's own attention, like token mixers (`fastdpo.modeling.mixers`), which cut the bias.

The self-check finds out by trial which of the three a model needs. Refused: limits that `packed_attention` does not
implement.
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

MASKS = ("none", "token", "whole", "sequence")
# Functions of transformers.masking_utils, by where they are defined, and the variable that holds a limit
_LIMITS = {"sliding_window_overlay": ("window", "sliding_window"), "chunked_overlay": ("chunk", "chunk_size")}
_NO_LIMITS = (
    *("causal_mask_function", "and_masks", "or_masks", "packed_sequence_mask_function"),
    *("remap_positions_for_packed_sequence", "padding_mask_function", "add_offsets_to_mask_function"),
)


@dataclass(frozen=True, eq=False)
class Carried:
    """The information about a packed row that a mask carries."""

    layout: PackedLayout
    window: int | None = None  # tokens a query sees, itself included
    chunk: int | None = None  # tokens see those of their own chunk of so many positions


# The information of masks, by the storage that they are views of: layers that run again in backward get another tensor
# over the same storage. A weak reference prevents a mix-up if the storage's number is reused.
_by_storage: dict[int, tuple[StorageWeakRef, Carried]] = {}
_row: ContextVar[PackedLayout | None] = ContextVar("packed_row", default=None)


def masks_of(layout: PackedLayout | None) -> AbstractContextManager[None]:
    """Context manager in which all requested masks are those of this row."""
    return nullcontext() if layout is None or layout.masks == "none" else _asked_of(layout)


@contextmanager
def _asked_of(layout: PackedLayout) -> Iterator[None]:
    token = _row.set(layout)
    try:
        yield
    finally:
        _row.reset(token)


def carried(mask: Tensor | None) -> Carried | None:
    """The information that a mask, or the mask it is a view of, carries; None for other masks."""
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
    """A clone that carries the same information."""
    about = carried(tensor)
    return tensor.clone() if about is None else _carrying(tensor.clone(), about)


def only_picked(mask: Tensor | None, indices: Tensor) -> Tensor:
    """The bias (1, 1, T, T) of a sparse layer, which sees only the keys in rows `indices` (1, T, k).

    Raises:
        ValueError: the mask is not whole, so the layer may have selected keys of other sequences.
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
        ValueError: the layer limits attention by anything other than a window or chunks.
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
    """The window and the chunk to which a mask function of transformers limits attention.

    Raises:
        ValueError: the function has other limits.
    """
    limits: dict[str, int] = {}
    todo = [function]
    while todo:
        function = todo.pop()
        origin = getattr(function, "__qualname__", repr(function)).partition(".")[0]
        inner = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
        if origin == "blockwise_overlay" and all(int(ids.max()) < 0 for ids in inner):
            continue  # blocks of other tokens than text, of which there are none
        if origin in _LIMITS:
            limit, variable = _LIMITS[origin]
            limits[limit] = dict(zip(function.__code__.co_freevars, inner, strict=True))[variable]
        elif origin not in _NO_LIMITS:
            raise ValueError(f"packed attention does not implement the masks of {origin}")
        for value in inner:
            todo += [part for part in (value if isinstance(value, tuple) else (value,)) if callable(part)]
    return limits
