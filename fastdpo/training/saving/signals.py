"""StopOnSignal: SIGTERM, SIGINT and SIGUSR1 end a run after a save, and the run says how it is continued.

In: signals of a batch system or of Ctrl-C. Out: the optimizer step ends, a checkpoint is saved, `Stopped` is raised: a
SystemExit with code 128 + the signal's number. A second signal ends the process at once. An evaluation does not end
first: the resumed run repeats it. Several processes stop after the same step, whichever of them got the signal. Outside
of training there is nothing to save, so the first signal raises at once.

The commands install the handlers. From Python nothing is installed unless this callback is given to a trainer.
Workers of data loaders outlive the signal, which launchers and batch systems send to them too: a run fails when one of
its workers dies, and would not save.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# A batch system may signal every process while torchrun passes on the signal that it got itself: within this time both
# are one request. A process without a launcher gets each signal once.
_SECONDS_OF_ONE_REQUEST = 2.0


class Stopped(SystemExit):
    """A signal ended the run. `code` is 128 + the signal's number."""


class EvaluationInterrupted(BaseException):
    """Ends an evaluation within training. No Exception, so that nothing in between takes it for an error."""


class StopOnSignal(TrainerCallback):
    """Give it to a trainer's `callbacks`. Handlers are installed while it trains, and those before are then restored.

    Args:
        command: how the run is continued, as a command line. By default the call of `train` is printed.
    """

    def __init__(self, command: str | None = None) -> None:
        self.command = command
        self.received: int | None = None
        self._at = 0.0
        self._is_training = False
        self._before: dict[int, Any] = {}
        self._group: Any = None  # of the processes, on the CPU

    @property
    def is_installed(self) -> bool:
        return bool(self._before)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handles the signals inside the block. A block inside another changes nothing.

        Raises:
            ValueError: this is not the main thread, which alone receives signals.
        """
        if self._before:
            yield
            return
        if threading.current_thread() is not threading.main_thread():
            raise ValueError("StopOnSignal must be used in the main thread, which alone receives signals")
        self.received = None
        self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        try:
            yield
        finally:
            for number, before in self._before.items():
                signal.signal(number, signal.SIG_DFL if before is None else before)
            self._before = {}

    @contextmanager
    def training(self) -> Iterator[None]:
        """Inside, the first signal waits for the end of the step."""
        self._join_processes()
        with self.installed():
            self._is_training = True
            try:
                yield
            finally:
                self._is_training = False

    def is_asked(self) -> bool:
        """Whether any process got a signal. Every process must call it equally often."""
        if self._group is None:
            return self.received is not None
        received = torch.tensor([self.received or 0])
        torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX, group=self._group)
        if self.received is None and int(received):
            self.received, self._at = int(received), time.monotonic()
        return self.received is not None

    def stop(self, checkpoint: Path, *, is_main: bool) -> None:
        """Says how to go on, and raises Stopped: on all processes once the main one has said it, because launchers end
        those that are left when the first one ends."""
        assert self.received is not None
        if is_main:
            name = signal.Signals(self.received).name
            go_on = self.command or f"trainer.train(resume_from_checkpoint={str(checkpoint)!r})"
            print(f"{name}: stopped after a save in {checkpoint}. To continue: {go_on}", file=sys.stderr, flush=True)
        if self._group is not None:
            torch.distributed.barrier(group=self._group)
        raise Stopped(128 + self.received)

    def _join_processes(self) -> None:
        """A group on the CPU: asking it does not wait for a GPU."""
        distributed = torch.distributed
        if self._group is None and distributed.is_available() and distributed.is_initialized():
            self._group = distributed.new_group(backend="gloo")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is not None:
            if not _has_launcher() or now - self._at > _SECONDS_OF_ONE_REQUEST:
                os._exit(128 + number)
            return
        self.received, self._at = number, now
        name = signal.Signals(number).name
        if not self._is_training:
            again = "" if self.command is None else f", or, if the run has a checkpoint: {self.command}"
            _tell(f"{name}: stopped outside of training. To continue, start the run again{again}")
            raise Stopped(128 + number)
        _tell(f"{name}: the run stops after this step, and saves; a second signal ends it at once")
        if not _has_launcher():
            for each in SIGNALS:  # the default ends the process at once, even inside a library that never returns
                signal.signal(each, signal.SIG_DFL)


class Spared:
    """`worker_init_fn` of a data loader whose workers outlive the signals that stop the run.

    They end when the run ends them; a SIGTERM that comes later than the first still ends a worker that does not.

    Args:
        inner: the function that it replaces.
    """

    def __init__(self, inner: Callable[[int], Any] | None) -> None:
        self.inner = inner
        self._at: float | None = None

    def __call__(self, worker: int) -> None:
        signal.signal(signal.SIGTERM, self._terminate)
        for number in (signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        if self.inner is not None:
            self.inner(worker)

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._at is not None and now - self._at > _SECONDS_OF_ONE_REQUEST:
            os._exit(128 + number)
        self._at = now if self._at is None else self._at


def spare_workers(loader: Any) -> Any:
    """The data loader, of torch or of accelerate, whose workers outlive the signals that stop the run."""
    inner = getattr(loader, "base_dataloader", loader)
    if not isinstance(inner.worker_init_fn, Spared):
        inner.worker_init_fn = Spared(inner.worker_init_fn)
    return loader


def _has_launcher() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def _tell(text: str) -> None:
    """Writes to stderr past its buffer, in whose code the signal may have arrived."""
    os.write(2, f"\n{text}\n".encode())
