"""Measuring: interleaved runs, medians, and the facts of the machine that a figure is worth nothing without."""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def machine_facts() -> dict[str, Any]:
    """Hardware, versions and commit of this run."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    on_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else _cpu_name(),
        "num_threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if on_gpu else None,
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or None,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def interleaved_ms(functions: dict[str, Callable[[], Any]], num_runs: int) -> dict[str, dict[str, float]]:
    """Median, minimum and maximum milliseconds of each function; one warm-up, then A B C A B C ..."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for run in range(num_runs + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if run > 0:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: {"ms": statistics.median(t), "ms_min": min(t), "ms_max": max(t)} for name, t in times.items()}
