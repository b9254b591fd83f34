"""How many threads a CPU can run without competing with other programs.

Threads that share an operation wait for the slowest one. If another program occupies one of the cores, one thread waits
for it at every operation, and small models become many times slower than on a single thread. In: the work of the cores
and of this process since the last call. Out: a number of threads, or a warning.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import psutil

BETWEEN_LOOKS = 1.0  # seconds; the system counts in steps of 10 ms, so the error is a few hundredths


class FreeCores:
    """The number of this process's cores that other programs left free since the last call; all cores at first."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._cores = cores_of_this_process()
        self.num_cores = len(self._cores)
        self.free = float(self.num_cores)
        self._seen = self._look()

    def threads(self, most: int) -> int:
        """One thread per core that is more than half free, from 1 to `most`. Cheap: measures once a second."""
        now, busy, own = self._look()
        seconds = now - self._seen[0]
        if seconds >= BETWEEN_LOOKS:
            others = (busy - self._seen[1]) - (own - self._seen[2])
            self.free = self.num_cores - max(0.0, others / seconds)
            self._seen = now, busy, own
        return max(1, min(most, round(self.free)))

    def _look(self) -> tuple[float, float, float]:
        """The time, the busy seconds of the cores, and the busy seconds of this process on all its threads."""
        times = psutil.cpu_times(percpu=True)
        idle = sum(times[core].idle + getattr(times[core], "iowait", 0.0) for core in self._cores)
        now, own = self._clock(), sum(os.times()[:4])
        return now, now * self.num_cores - idle, own


def cores_of_this_process() -> list[int]:
    """The core numbers of this process; all of the machine if the system sets no limit."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(psutil.cpu_count() or 1))


def busy_cores_warning(free: float, num_cores: int, num_threads: int) -> str | None:
    """A warning for a CPU run with the default number of threads; None if its threads have enough free cores."""
    if "OMP_NUM_THREADS" in os.environ or num_threads <= max(1, round(free)):
        return None
    return (
        f"other programs keep {num_cores - free:.1f} of {num_cores} CPU cores busy: this run's {num_threads} threads"
        " will wait for each other, and small models become many times slower; put OMP_NUM_THREADS=1 before the command"
    )
