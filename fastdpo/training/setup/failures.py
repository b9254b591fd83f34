"""Ends all processes of a run with one message when one of them fails.

In: the code of a run, on every process. Out: on every process, the error of the one that failed. Without this the
others wait for it in their next exchange: with gloo until it has ended, with NCCL until a timeout of ten minutes.

The process that fails writes its message into the store in which the processes have met. A thread of every process
reads the store every two seconds, and prints the message at once, because a launcher may end the process before it
raises. A process that has not come to its end some seconds later is ended, because nothing can interrupt a wait inside
NCCL. A process that is killed leaves no message: the others then say that, as soon as their connection to it breaks.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch

SECONDS_BETWEEN_LOOKS = 2.0
SECONDS_TO_HEAR = 6.0  # that the process that failed gives the others to print its message
SECONDS_TO_END = 20.0  # that the others have, once they know
_MOST_CHARACTERS = 4000
_BROKEN = ("gloo", "nccl", "connection reset", "connection closed", "broken pipe", "socket")  # in errors of torch
_num_runs = 0
_is_watching = False


class OtherProcessFailed(ConnectionError):
    """Another process of the run has failed; the message says which, and why."""


@contextmanager
def failing_together(args: Any) -> Iterator[None]:
    """Inside, an error of one process ends all of them. Every process must enter it equally often. A block inside
    another changes nothing.

    Args:
        args: the settings of the run, with `world_size` and `process_index`.
    Raises:
        OtherProcessFailed: another process failed, or has ended.
    """
    global _is_watching
    watch = None if _is_watching or args.world_size == 1 else _watch(args.process_index, args.world_size)
    if watch is None:
        yield
        return
    _is_watching = True
    try:
        with watch:
            yield
    except Exception as error:
        raise watch.error_for_all(error) from error
    finally:
        _is_watching = False


def _watch(process: int, num_processes: int) -> _Watch | None:
    """None if the processes have not met by torch's usual way, a host and a port in the environment."""
    global _num_runs
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not (host and port and torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    _num_runs += 1
    try:  # a connection of its own: torch's may wait inside an exchange
        store = torch.distributed.TCPStore(
            host, int(port), is_master=False, wait_for_workers=False, timeout=timedelta(seconds=10)
        )
    except (RuntimeError, ValueError):  # another kind of store
        return None
    generation = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun's store outlives a restart
    return _Watch(store, f"fastdpo/failed/{generation}/{_num_runs}", process, num_processes)


class _Watch:
    """The thread, and the messages in the store."""

    def __init__(self, store: Any, key: str, process: int, num_processes: int) -> None:
        self.store, self.key, self.process, self.num_processes = store, key, process, num_processes
        self._lock = threading.Lock()  # of the connection
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="fastdpo_failures", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: Any) -> None:
        self._ended.set()

    def error_for_all(self, error: Exception) -> Exception:
        """The error to raise here: that of the process that failed first, or this one, once the others have read it."""
        text = self._text(wait=is_broken_connection(error))
        if text is not None:  # all have raised the same where they have found it out together
            return error if str(error)[:_MOST_CHARACTERS] in text else OtherProcessFailed(text)
        if is_broken_connection(error):
            return OtherProcessFailed(
                "another process of this run has ended without a message: it was killed, by hand or for its memory;"
                " the last checkpoint is sound, and --resume_from_checkpoint last continues the run"
            )
        with suppress(RuntimeError):  # a store that is gone: so are the others
            message = f"process {self.process} failed: {type(error).__name__}: {str(error)[:_MOST_CHARACTERS]}"
            with self._lock:
                self.store.set(self.key, json.dumps({"process": self.process, "text": message}))
            self._wait_for_readers()
        return error

    def _wait_for_readers(self) -> None:
        until = time.monotonic() + SECONDS_TO_HEAR
        while time.monotonic() < until:
            with self._lock:
                if self.store.add(f"{self.key}/readers", 0) >= self.num_processes - 1:
                    return
            time.sleep(0.1)

    def _text(self, *, wait: bool = False) -> str | None:
        """The message of another process, which comes before its connection breaks."""
        until = time.monotonic() + (1.0 if wait else 0.0)
        with suppress(RuntimeError):
            while True:
                with self._lock:
                    if self.store.check([self.key]):
                        found = json.loads(self.store.get(self.key))
                        return None if found["process"] == self.process else str(found["text"])
                if time.monotonic() >= until:
                    return None
                time.sleep(0.1)
        return None

    def _look(self) -> None:
        """Runs in the thread."""
        while not self._ended.wait(SECONDS_BETWEEN_LOOKS):
            try:
                with self._lock:
                    has_failed = self.store.check([self.key])
            except RuntimeError:  # the process that holds the store has ended
                return
            text = self._text() if has_failed else None
            if text is None:
                continue
            _tell(f"{text}\nfastdpo: process {self.process} stops with it")
            with suppress(RuntimeError), self._lock:
                self.store.add(f"{self.key}/readers", 1)
            if not self._ended.wait(SECONDS_TO_END):
                os._exit(1)
            return


def is_broken_connection(error: BaseException) -> bool:
    """Whether torch has raised this because another process does not answer."""
    if isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error).lower() for part in _BROKEN)


def _tell(text: str) -> None:
    sys.stderr.flush()
    os.write(2, f"\nfastdpo: {text}\n".encode())
