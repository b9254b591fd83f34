"""Measuring: interleaved times, peak memory, the matmul rate, and the facts of the machine.

In: functions without arguments. Out: plain numbers for one JSON line. Times are wall-clock on the CPU and CUDA events
on a GPU; memory is taken in a run of its own, because counting allocations slows a run down.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastdpo.evidence.memory import peak_live_bytes

# Methods of very different appetite share one process; without this the allocator's leftovers of one stop the next.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

MIB = 2**20
CHECKOUT = Path(__file__).resolve().parents[3]
NUM_WARMUPS = 2  # the first call compiles, the second finds the clocks where they stay


def machine_facts() -> dict[str, Any]:
    """Hardware, driver, versions and commit of this run, without which a figure is worth nothing."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    on_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else _cpu_name(),
        "num_threads": torch.get_num_threads(),
        "driver": _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
        "clock": _output_of("nvidia-smi", "--query-gpu=clocks.sm,clocks.max.sm", "--format=csv,noheader")
        if on_gpu
        else None,
        "commit": _commit(),
    }


def interleaved_ms(functions: dict[Any, Callable[[], Any]], num_runs: int) -> dict[Any, dict[str, float]]:
    """Median, minimum and maximum milliseconds of each function: warm-ups, then A B C A B C ...

    And `cpu_ms`, the median of what all threads of this process spend: other processes change it less.
    """
    times: dict[Any, list[float]] = {name: [] for name in functions}
    spent: dict[Any, list[float]] = {name: [] for name in functions}
    for run in range(-NUM_WARMUPS, num_runs):
        for name, function in functions.items():
            before = time.process_time()
            elapsed = elapsed_ms(function)
            on_cpu = 1e3 * (time.process_time() - before)
            if run >= 0:
                times[name].append(elapsed)
                spent[name].append(on_cpu)
    median = statistics.median
    return {
        name: {"ms": median(t), "ms_min": min(t), "ms_max": max(t), "cpu_ms": median(spent[name])}
        for name, t in times.items()
    }


def elapsed_ms(function: Callable[[], Any]) -> float:
    """Milliseconds of one call; on a GPU between two events on the current stream."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - start)
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def peak_mib(function: Callable[[], Any]) -> float:
    """The most MiB that one call holds at a time beyond what was there before, its results included."""
    return peak_live_bytes(function, "cuda" if torch.cuda.is_available() else "cpu") / MIB


def matmul_shape(num_rows: int, hidden_size: int, vocab_size: int) -> tuple[int, int, int]:
    """(M, K, N) of the matmul that rates are measured against: the op's own product, and on a GPU 8192 cubed."""
    return (8192, 8192, 8192) if torch.cuda.is_available() else (num_rows, hidden_size, vocab_size)


def matmul_job(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Callable[[], Any], int]:
    """A bare matmul into memory that is there already, and the FLOPs of one call (several matmuls on a GPU)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    M, K, N = shape
    a = torch.randn(M, K, device=device, dtype=dtype)
    b = torch.randn(N, K, device=device, dtype=dtype)
    out = torch.empty(M, N, device=device, dtype=dtype)
    repeats = 10 if device == "cuda" else 1  # one 8192 cubed takes 1.4 ms on an H200, too short to time alone

    def job() -> None:
        for _ in range(repeats):
            torch.mm(a, b.T, out=out)

    return job, 2 * M * K * N * repeats


def free_bytes() -> int:
    """Memory that a new tensor could still take."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 2**63
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def append_lines(path: str | None, records: list[dict[str, Any]]) -> None:
    """One JSON line per record; at once, so that a run that is stopped early leaves what it has."""
    if path is None:
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def _commit() -> str | None:
    """Short hash of the checkout, with a + where the code that is measured differs from it; None for a wheel."""
    if not (CHECKOUT / ".git").exists():
        return None
    commit = _output_of("git", "rev-parse", "--short", "HEAD")
    code = (":/fastdpo", ":/kernels", ":/benchmarks/*.py")  # not the results, to which records are being written
    changed = _output_of("git", "status", "--porcelain", "--untracked-files=no", "--", *code)
    return f"{commit}+" if commit and changed else commit


def _output_of(*command: str) -> str | None:
    folder = CHECKOUT if CHECKOUT.exists() else None
    try:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return result.stdout.strip().split("\n")[0] or None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
