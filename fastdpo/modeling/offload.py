"""Checkpoints of layers in host memory: the input of a layer, which gradient checkpointing keeps, leaves the GPU in
forward and comes back in backward, one layer ahead of its use.

In: a model with gradient checkpointing. Out: the same model, whose checkpoints are copied on a stream of their own, to
pinned buffers that later steps use again. At most `ON_DEVICE` checkpoints are on the device at a time: in forward those
whose copies are under way, in backward that of the running layer and the next one. The compute stream waits for a copy
only where it would need the memory or the numbers before they are there. Transformers' own `offload` copies on the
compute stream.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

ON_DEVICE = 2
LEAST_BYTES = 2**16  # smaller tensors stay where they are


class Copies(Protocol):
    """Copies between a device and its host, in the order in which they are asked for."""

    def buffer(self, shape: torch.Size, dtype: torch.dtype) -> Any:
        """A buffer in host memory."""
        ...

    def to_host(self, tensor: Tensor, buffer: Any) -> Any:
        """Starts a copy; returns a mark of its end."""
        ...

    def to_device(self, buffer: Any, device: torch.device) -> tuple[Tensor, Any]:
        """Starts a copy into a new tensor; returns it and a mark of the end."""
        ...

    def wait(self, mark: Any) -> None:
        """Later work on the device starts after the marked copy."""
        ...


class CudaCopies:
    """Pinned buffers and a side stream."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)

    def buffer(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def to_host(self, tensor: Tensor, buffer: Tensor) -> Any:
        self.stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(self.stream):
            buffer.copy_(tensor, non_blocking=True)
            return self.stream.record_event()

    def to_device(self, buffer: Tensor, device: torch.device) -> tuple[Tensor, Any]:
        copy = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)  # on the compute stream, which frees it too
        self.stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self.stream):
            copy.copy_(buffer, non_blocking=True)
            return copy, self.stream.record_event()

    def wait(self, mark: Any) -> None:
        torch.cuda.current_stream().wait_event(mark)


class PlainCopies:
    """For a CPU, whose own memory is the device's: buffers come from NumPy, outside PyTorch's allocator."""

    def buffer(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        size = shape.numel() * dtype.itemsize
        return torch.from_numpy(np.empty(size, dtype=np.uint8)).view(dtype).view(shape)

    def to_host(self, tensor: Tensor, buffer: Tensor) -> None:
        buffer.copy_(tensor)

    def to_device(self, buffer: Tensor, device: torch.device) -> tuple[Tensor, None]:
        return torch.empty(buffer.shape, dtype=buffer.dtype, device=device).copy_(buffer), None

    def wait(self, mark: None) -> None:
        pass


class DryCopies:
    """For tensors without storage: host memory is not counted, the device's is."""

    def buffer(self, shape: torch.Size, dtype: torch.dtype) -> tuple[torch.Size, torch.dtype]:
        return shape, dtype

    def to_host(self, tensor: Tensor, buffer: Any) -> None:
        pass

    def to_device(self, buffer: Any, device: torch.device) -> tuple[Tensor, None]:
        return torch.empty(buffer[0], dtype=buffer[1], device=device), None

    def wait(self, mark: None) -> None:
        pass


class _Checkpoint:
    """One saved tensor: in host memory always, on the device while it is new or about to be used."""

    def __init__(self, store: HostCheckpoints, tensor: Tensor) -> None:
        self.store, self.device, self.kind = store, tensor.device, (tensor.shape, tensor.dtype)
        self.tensor: Tensor | None = tensor.contiguous()
        free = store.free.setdefault(self.kind, [])
        self.buffer = free.pop() if free else store.copies.buffer(*self.kind)
        self.mark = store.copies.to_host(self.tensor, self.buffer)

    def leave(self) -> None:
        """Frees the device's memory, whose next use comes after the copy."""
        if self.tensor is not None:
            self.store.copies.wait(self.mark)
            self.tensor = None

    def come_back(self) -> None:
        if self.tensor is None:
            self.tensor, self.mark = self.store.copies.to_device(self.buffer, self.device)

    def taken(self) -> Tensor:
        """The tensor on the device, which only the caller keeps."""
        self.come_back()
        self.store.copies.wait(self.mark)
        assert self.tensor is not None
        tensor, self.tensor = self.tensor, None
        return tensor

    def __del__(self) -> None:  # with its graph; later copies into the buffer come after those out of it
        self.leave()  # a forward without backward: its memory must not be used again while it is copied
        self.store.free[self.kind].append(self.buffer)


class HostCheckpoints:
    """The checkpoints of a model's layers, in the order of its forward."""

    def __init__(self, copies: Copies, least_bytes: int = LEAST_BYTES) -> None:
        self.copies, self.least_bytes = copies, least_bytes
        self.order: list[weakref.ref[_Checkpoint]] = []
        self.free: dict[Any, list[Any]] = {}  # host buffers by shape and dtype

    def around(self, checkpointed: Callable[..., Any]) -> Callable[..., Any]:
        """A checkpoint function whose saved tensors are in host memory."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
                return checkpointed(*args, **kwargs)

        return run

    def _pack(self, tensor: Tensor) -> Any:
        if isinstance(tensor, nn.Parameter) or tensor.numel() * tensor.element_size() < self.least_bytes:
            return tensor
        while self.order and self.order[-1]() is None:  # of graphs that are gone
            self.order.pop()
        if len(self.order) >= ON_DEVICE - 1:
            _call(self.order[1 - ON_DEVICE], _Checkpoint.leave)
        kept = _Checkpoint(self, tensor.detach())
        self.order.append(weakref.ref(kept))
        return kept

    def _unpack(self, kept: Any) -> Tensor:
        if not isinstance(kept, _Checkpoint):
            tensor: Tensor = kept
            return tensor
        tensor = kept.taken()
        places = [place for place, found in enumerate(self.order) if found() is kept]
        if places and places[0] > 0:
            _call(self.order[places[0] - 1], _Checkpoint.come_back)
        return tensor


def _call(found: weakref.ref[_Checkpoint], method: Callable[[_Checkpoint], None]) -> None:
    kept = found()
    if kept is not None:
        method(kept)


def offload_checkpoints(model: nn.Module, copies: Copies, least_bytes: int = LEAST_BYTES) -> HostCheckpoints:
    """Moves the checkpoints of a model with gradient checkpointing to the host, whichever way it was enabled."""
    store = HostCheckpoints(copies, least_bytes)
    around: dict[int, Any] = {}
    for module in model.modules():
        function = module.__dict__.get("_gradient_checkpointing_func")
        if function is not None:
            kwargs = getattr(function, "keywords", None) or {"use_reentrant": False}
            around.setdefault(id(function), store.around(functools.partial(checkpoint, **kwargs)))
            module.__dict__["_gradient_checkpointing_func"] = around[id(function)]
    return store
