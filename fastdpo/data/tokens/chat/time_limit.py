"""Stops code of strangers that runs too long, such as a chat template with an endless loop.

One thread watches: it raises an exception in the thread whose time is over. So it also works outside of the main
thread, and costs a microsecond where the time is kept. Code that waits inside one C function is stopped at its end.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_LOOKS_EVERY = 0.25  # seconds


class TooLong(Exception):
    """The time is over."""


class _Watch:
    """Deadlines of threads."""

    def __init__(self) -> None:
        self._deadlines: dict[int, float] = {}  # by the ident of the thread
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def begin(self, seconds: float) -> None:
        with self._lock:
            self._deadlines[threading.get_ident()] = time.monotonic() + seconds
            if self._thread is None:
                self._thread = threading.Thread(target=self._look, name="fastdpo-time-limit", daemon=True)
                self._thread.start()

    def end(self) -> None:
        with self._lock:
            self._deadlines.pop(threading.get_ident(), None)

    def _look(self) -> None:
        while True:
            time.sleep(_LOOKS_EVERY)
            with self._lock:
                if not self._deadlines:
                    self._thread = None
                    return
                now = time.monotonic()
                for ident in [ident for ident, end in self._deadlines.items() if end < now]:
                    del self._deadlines[ident]
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(TooLong))


_watch = _Watch()
os.register_at_fork(after_in_child=_watch.__init__)  # type: ignore[misc]  # whose lock a thread may hold that is gone


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Runs the block for at most about `seconds`. Blocks must not be nested.

    Raises:
        TooLong: the time is over.
    """
    _watch.begin(seconds)
    try:
        yield
    finally:
        _watch.end()
