"""The part of a run's state that Trainer's checkpoints lack, so that a resumed run goes on exactly.

In: numbers of a running training. Out: PROGRESS_FILE in its checkpoint, one per process, as JSON: Python writes floats
so that they are read back bit by bit. Trainer itself saves weights, optimizer, scheduler, scaler and random states.

An example: with logging_steps=10 and save_steps=4, the checkpoint of step 4 is in the middle of a log entry. Trainer
would begin the entry anew, and log the mean over steps 5 to 10.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
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
    rows_per_step: int = 0  # of all processes; 0 in checkpoints of earlier versions
    num_accumulated: int = 0  # batches of a process in a step; 0 likewise
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
    """The progress in a checkpoint; None for one of another version, or without. If another number of processes has
    saved it, its sums are those of process 0, and the other processes go on from 0."""
    first = _read(folder, 0)
    if first is None or first.num_processes == num_processes:
        return first if process == 0 or first is None else _read(folder, process)
    others = [_read(folder, number) for number in range(1, first.num_processes)]
    saved = [first, *(other for other in others if other is not None)]
    return None if len(saved) < first.num_processes else _dealt(saved, process)


def _read(folder: str | Path, process: int) -> Progress | None:
    path = progress_file(folder, process)
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
        return Progress(**found) if found.pop("format", None) == _FORMAT else None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:  # of a checkpoint without a manifest
        raise ValueError(f"{path} must hold the progress of a run, got {error!r}") from error


def _dealt(saved: Sequence[Progress], process: int) -> Progress:
    """The progress of one of another number of processes. Sums over processes and the mean of the loss stay."""
    return replace(
        saved[0],
        loss_sum=sum(progress.loss_sum for progress in saved) / len(saved),  # logged is the mean over processes
        means=_summed_means([progress.means for progress in saved], share=1.0 if process == 0 else 0.0),
        num_tokens=sum(progress.num_tokens for progress in saved) if process == 0 else 0,
    )


def _summed_means(states: Sequence[dict[str, Any]], share: float) -> dict[str, Any]:
    """The sum of states of MetricMeans, times `share`; with all keys also if the share is 0."""
    tables: dict[tuple[tuple[str, ...], tuple[str, ...]], list[float]] = {}
    weights: dict[str, float] = {}
    for state in states:
        for sums, on_device, numbers in state["tables"]:
            key = tuple(sums), tuple(on_device)
            before = tables.get(key, [0.0] * len(numbers))
            tables[key] = [old + share * new for old, new in zip(before, numbers, strict=True)]
        for name, weight in state["weights"].items():
            weights[name] = weights.get(name, 0.0) + share * weight
    return {"tables": [[*map(list, key), numbers] for key, numbers in tables.items()], "weights": weights}


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
    """Restores what `random_states` has returned."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])  # noqa: NPY002
    torch.set_rng_state(states["cpu"])
    if states["cuda"] is not None:
        torch.cuda.set_rng_state_all(states["cuda"])


def load_random_states(folder: str | Path) -> None:
    """Loads the random states of process 0 of a run, whatever its number of processes was."""
    from transformers.trainer_pt_utils import safe_globals

    names = ("rng_state.pth", "rng_state_0.pth")
    path = next((path for name in names if (path := Path(folder, name)).is_file()), None)
    if path is None:
        return
    with safe_globals():
        states = torch.load(path, weights_only=True)
    cuda = states.get("cuda")
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda[0] if isinstance(cuda, list) else cuda)
    set_random_states({**states, "cuda": None})
