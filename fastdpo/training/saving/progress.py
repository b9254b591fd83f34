"""The part of a run's state that Trainer's checkpoints lack, so that a resumed run goes on exactly.

In: numbers of a running training. Out: PROGRESS_FILE in its checkpoint, one per process, as JSON: Python writes floats
so that they are read back bit by bit. Trainer itself saves weights, optimizer, scheduler, scaler and random states.

An example: with logging_steps=10 and save_steps=4, the checkpoint of step 4 is in the middle of a log entry. Trainer
would begin the entry anew, and log the mean over steps 5 to 10.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from fastdpo.files import write_whole

_FORMAT = 1


@dataclass
class Progress:
    """What a process knows at a checkpoint."""

    num_processes: int  # of the run
    loss_sum: float  # since the last log entry, on this process
    total_loss: float  # of the log entries
    last_logged_step: int
    means: dict[str, Any]  # of MetricMeans: the metrics since the last log entry
    num_tokens: int  # since the last log entry
    grad_norm: float | None  # of the last step
    learning_rate: float | None  # of the last step
    order_state: str  # torch's random state when the epoch began, in hex: the order of its rows comes from it
    num_passes: int  # over a stream, finished
    num_batches: int  # of the pass over a stream that is under way
    is_stopping: bool  # whether a callback ends training here
    has_ended_epoch: bool  # whether this is the checkpoint of an epoch's end
    # what is left to do at this step, because a signal interrupted it
    evaluates: bool = False
    saves: bool = False  # after the evaluation
    parts: dict[str, Any] = field(default_factory=dict)  # state of the parts of the run, by name


class Part(Protocol):
    """A part of a run with a state of its own."""

    def state(self) -> dict[str, Any]:
        """The state, in types that JSON has."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Called before training starts."""
        ...


def progress_file(folder: str | Path, process: int) -> Path:
    return Path(folder) / ("fastdpo_progress.json" if process == 0 else f"fastdpo_progress_{process}.json")


def save_progress(progress: Progress, folder: str | Path, process: int) -> None:
    write_whole(progress_file(folder, process), json.dumps({"format": _FORMAT, **asdict(progress)}))


def load_progress(folder: str | Path, process: int, num_processes: int) -> Progress | None:
    """The progress in a checkpoint; None on all processes for a checkpoint of another version or number of them."""
    path = progress_file(folder, process)
    if not path.is_file():
        return None
    found = json.loads(path.read_text())
    if found.pop("format", None) != _FORMAT or found.get("num_processes") != num_processes:
        return None
    return Progress(**found)


def as_hex(state: torch.Tensor) -> str:
    """A random state of torch, (N,) uint8, as text."""
    return state.numpy().tobytes().hex()


def from_hex(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def random_states() -> dict[str, Any]:
    """The states of all random generators that training reads."""
    of_numpy = np.random.get_state()  # noqa: NPY002 (the global one, which collators may use)
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    return {"python": random.getstate(), "numpy": of_numpy, "cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])  # noqa: NPY002
    torch.set_rng_state(states["cpu"])
    if states["cuda"] is not None:
        torch.cuda.set_rng_state_all(states["cuda"])
