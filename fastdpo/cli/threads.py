"""How many threads a CPU has room for beside what else runs on it.

Threads that share an operation wait for the last of them. Where another program has one of the cores, that one thread
waits for its turn at every operation, and small models become many times slower than on a single thread. In: what
cores and this process have done since the last look. Out: a number of threads, or a line that tells of it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import psutil

BETWEEN_LOOKS = 1.0  # seconds; what the system counts in steps of 10 ms is then known to a few hundredths


class FreeCores:
    """Of the cores that this process may run on, how many others have left free since the last look; all at first."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._cores = cores_of_this_process()
        self.num_cores = len(self._cores)
        self.free = float(self.num_cores)
        self._seen = self._look()

    def threads(self, most: int) -> int:
        """At most `most`, one for every core that is more than half free, at least 1. Cheap: looks once a second."""
        now, busy, own = self._look()
        seconds = now - self._seen[0]
        if seconds >= BETWEEN_LOOKS:
            others = (busy - self._seen[1]) - (own - self._seen[2])
            self.free = self.num_cores - max(0.0, others / seconds)
            self._seen = now, busy, own
        return max(1, min(most, round(self.free)))

    def _look(self) -> tuple[float, float, float]:
        """Now; the seconds that the cores have worked; those that this process has, on all its threads."""
        times = psutil.cpu_times(percpu=True)
        idle = sum(times[core].idle + getattr(times[core], "iowait", 0.0) for core in self._cores)
        now, own = self._clock(), sum(os.times()[:4])
        return now, now * self.num_cores - idle, own


def cores_of_this_process() -> list[int]:
    """Their numbers; all of the machine where the system has no such limit."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(psutil.cpu_count() or 1))


def busy_cores_warning(free: float, num_cores: int, num_threads: int) -> str | None:
    """For a run on a CPU whose number of threads nobody has chosen; None where its threads have the cores they need."""
    if "OMP_NUM_THREADS" in os.environ or num_threads <= max(1, round(free)):
        return None
    return (
        f"other programs keep {num_cores - free:.1f} of {num_cores} CPU cores busy: its {num_threads} threads will"
        " wait for each other, which makes small models many times slower; OMP_NUM_THREADS=1 before the command helps"
    )
