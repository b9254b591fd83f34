"""Tells the other processes of a run that this one must stop, and why: without it they would wait for this one in a
collective, until a launcher kills them.

In: a message of the process that stops. Out: the same message on all processes, each of which ends: the one that stops
by its own error; the others when their main thread, which may be inside a collective that never ends, has not ended by
itself within GRACE seconds. For errors of one process alone, such as a row that does not fit into its memory.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist

GRACE = 5.0  # seconds
_EVERY = 1.0  # seconds between two looks
_KEY = "fastdpo/stopped"


class Peers:
    """The processes of a run, seen from one of them."""

    def __init__(self) -> None:
        self._store: Any = None
        self._is_over = threading.Event()
        self._number = 0  # of this training in the process
        self._has_told = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, this process ends if another one has told why it stops. All processes must enter it equally often."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            yield
            return
        self._number += 1
        store: Any = dist.distributed_c10d._get_default_store()
        self._store = store.clone()  # a connection of its own: no call waits
        self._is_over, self._has_told = threading.Event(), False
        watcher = threading.Thread(target=self._watch, name="fastdpo_peers", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            self._is_over.set()
            watcher.join()
            self._store = None

    def tell(self, message: str) -> None:
        """Tells the others. This process then raises an error of its own."""
        if self._store is not None:
            self._has_told = True
            self._store.set(self._key, f"process {dist.get_rank()} of {dist.get_world_size()}: {message}")

    @property
    def _key(self) -> str:
        return f"{_KEY}/{self._number}"

    def _watch(self) -> None:
        while not self._is_over.wait(_EVERY):
            try:
                if self._has_told or not self._store.check([self._key]):
                    continue
                self._store.set_timeout(timedelta(seconds=GRACE))
                message = self._store.get(self._key).decode()
            except RuntimeError:  # the process that holds the store has ended
                return
            if not self._is_over.wait(GRACE):
                print(f"ValueError on another process, {message}", file=sys.stderr, flush=True)
                os._exit(1)
            return
