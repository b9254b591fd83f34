"""Moves a collated batch to a GPU in one copy: a dict of tensors in, the same dict as views of one GPU buffer out.

A packed batch has about fifteen small tensors. Copying them one by one from pageable memory blocks the host each time;
one copy from a pinned buffer does not, so the host launches the next kernels during the copy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

_ALIGNMENT = 16  # bytes, where kernels and views of any dtype may begin


class OneBuffer(dict[str, Any]):
    """The batch from a collator: a dict with a method `to`, which accelerate calls as for a tensor.

    `examples` are the rows of each micro-batch, if the collator tells them: no tensors, and no keys of the batch.
    `num_own_rows` is the number of its first rows that no other process has; None if that is all of them.
    """

    examples: tuple[Any, ...] | None = None
    num_own_rows: int | None = None

    def to(self, device: torch.device | str | int, non_blocking: bool = True) -> OneBuffer:
        """The batch on `device`, including nested mappings and tuples; the batch itself if it is already there.

        `non_blocking` is accelerate's setting, False by default; a pinned copy is correct either way, because the host
        never writes to the buffer again.
        """
        device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        elsewhere: list[Tensor] = []

        def look(tensor: Tensor) -> Tensor:
            if not _is_on(tensor, device):
                elsewhere.append(tensor)
            return tensor

        _each_tensor(self, look)
        if not elsewhere:
            return self
        moved = iter(_moved_together(elsewhere, device))
        there = OneBuffer(_each_tensor(self, lambda tensor: tensor if _is_on(tensor, device) else next(moved)))
        there.examples, there.num_own_rows = self.examples, self.num_own_rows
        return there


def _is_on(tensor: Tensor, device: torch.device) -> bool:
    return tensor.device.type == device.type and device.index in (None, tensor.device.index)


def _each_tensor(value: Any, of_tensor: Callable[[Tensor], Tensor]) -> Any:
    """The same nested mappings, tuples and lists, with `of_tensor` applied to each tensor in reading order."""
    if isinstance(value, Tensor):
        return of_tensor(value)
    if isinstance(value, Mapping):
        return {key: _each_tensor(item, of_tensor) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_each_tensor(item, of_tensor) for item in value)
    return value


def _moved_together(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """Copies on `device`, as views of one buffer."""
    starts, end = [], 0
    for tensor in tensors:
        starts.append(end)
        size = tensor.numel() * tensor.element_size()
        end += -(-size // _ALIGNMENT) * _ALIGNMENT
    buffer = torch.empty(end, dtype=torch.uint8, pin_memory=device.type == "cuda")

    def view(whole: Tensor, tensor: Tensor, start: int) -> Tensor:
        part = whole[start : start + tensor.numel() * tensor.element_size()]
        return part.view(tensor.dtype).view(tensor.shape)

    for tensor, start in zip(tensors, starts, strict=True):
        view(buffer, tensor, start).copy_(tensor)
    there = buffer.to(device, non_blocking=True)
    return [view(there, tensor, start) for tensor, start in zip(tensors, starts, strict=True)]
