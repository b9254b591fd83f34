"""Peak memory by measurement: how many bytes of tensors a call holds at once, beyond what was alive before it.

In: a function without arguments, and the device on which it works. Out: bytes. On CUDA the caching allocator keeps the
count; on the CPU every allocation and release that PyTorch's allocator reports to the profiler is added up, those
inside C++ operators and custom ops too. What a library takes from the system by itself (MKL's packed operands, numpy)
is in neither.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_live_bytes(function: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """The most bytes that tensors made by `function` occupy at one time, its result included.

    It runs twice and the second run is measured: the first makes what stays for later calls (cuBLAS's workspace).
    """
    device = torch.device(device)
    function()
    gc.collect()  # an older call's leftovers would otherwise be freed, and counted, in the middle
    if device.type == "cuda":
        return _cuda_peak(function, device)
    if device.type != "cpu":
        raise ValueError(f"device must be cpu or cuda, got {device}")
    return _cpu_peak(function)


def _cuda_peak(function: Callable[[], Any], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _cpu_peak(function: Callable[[], Any]) -> int:
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with _silent_stderr():
        profiler.start()
    try:
        result = function()  # noqa: F841  alive until the profiler has stopped
    finally:
        with _silent_stderr():
            profiler.stop()
    alive: dict[int, int] = {}
    total = peak = 0
    for address, size in _allocations(profiler):
        if size > 0:
            alive[address] = size
            total += size
            peak = max(peak, total)
        else:
            total -= alive.pop(address, 0)  # 0 for tensors from before: their end makes no room
    return peak


def _allocations(profiler: profile) -> list[tuple[int, int]]:
    """(address, bytes) of each allocation in order of time; bytes are negative where it is given back."""
    results: Any = profiler.profiler  # its parts have no types that say what an event holds
    pending: list[Any] = results.kineto_results.experimental_event_tree()[::-1]
    found = []
    while pending:
        event = pending.pop()
        pending.extend(event.children[::-1])
        if event.tag.name == "Allocation" and str(event.extra_fields.device) == "cpu":
            found.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    return [(address, size) for _, address, size in sorted(found, key=lambda event: event[0])]


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """PyTorch 2.13's profiler writes a line to file descriptor 2 whenever it starts and stops."""
    sys.stderr.flush()
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)
