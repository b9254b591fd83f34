"""Measures peak memory: the bytes of tensors that a call holds at once, beyond those alive before the call.

In: a function without arguments, and its device. Out: bytes. On CUDA the caching allocator counts; on the CPU the
allocations and releases that PyTorch's allocator reports to the profiler are summed, including those inside C++
operators and custom ops. Memory that a library takes directly from the system (MKL's packed operands, numpy) is not
counted.
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
    """The largest number of bytes that tensors made by `function` occupy at one time, including its result.

    The function runs twice, and the second run is measured: the first one allocates lasting memory such as cuBLAS's
    workspace.
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
            total += size - alive.get(address, 0)  # at an address in use: its release was not reported
            alive[address] = size
            peak = max(peak, total)
        else:
            total -= alive.pop(address, 0)  # 0 for tensors from before the call: freeing them does not count
    return peak


def _allocations(profiler: profile) -> list[tuple[int, int]]:
    """(address, bytes) of each allocation in order of time; bytes are negative for a release."""
    results: Any = profiler.profiler  # its events are not typed
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
    """Silences file descriptor 2, to which PyTorch 2.13's profiler writes a line whenever it starts and stops."""
    sys.stderr.flush()
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)
