"""Warns about known failures of preference training, each once per run, with its number.

In: the logs of training. Out: a warning, and a line of WARNINGS_FILE in the output directory, which the report reads.
Training itself does not change. `warning_checks.py` defines the failures. The numbers are means over the last
WINDOW_PAIRS pairs, so that small batches cause no false alarms.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.utils import logging

from fastdpo.training.callbacks.json_lines import append_lines, read_lines
from fastdpo.training.callbacks.warning_checks import CHECKS, Progress, reference_is_not_the_start

logger = logging.get_logger(__name__)

WARNINGS_FILE = "fastdpo_warnings.jsonl"
WINDOW_PAIRS = 256  # over so many pairs, an accuracy of 0.5 has a standard error of 0.03


class TrainingWatch(TrainerCallback):
    """Gives the warnings. `given` holds those of the run by name.

    Args:
        has_reference: whether the loss compares with a reference.
        first_means: returns the metrics of training since the last log, on this process.
        given: a dict to write the warnings to.
    """

    def __init__(
        self,
        *,
        has_reference: bool,
        first_means: Callable[[], Mapping[str, float]],
        given: dict[str, str] | None = None,
    ) -> None:
        self.has_reference, self.first_means = has_reference, first_means
        self.given: dict[str, str] = {} if given is None else given
        self._restored: dict[str, Any] = {}  # the state in the checkpoint that training resumes from

    def state(self) -> dict[str, Any]:
        """The window, and what it is compared with, for a checkpoint."""
        best = self._best_margin if math.isfinite(self._best_margin) else None
        window = [[pairs, dict(logs)] for pairs, logs in self._window]
        return {"window": window, "first": self._first, "best_margin": best, "last_step": self._last_step}

    def restore(self, state: dict[str, Any]) -> None:
        self._restored = state

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.given.clear()
        self._window: deque[tuple[int, Mapping[str, float]]] = deque()  # (pairs, means over them)
        self._first_step = self._last_step = state.global_step
        self._first: dict[str, float] | None = None  # means over the first full window
        self._best_margin = -math.inf
        restored, self._restored = self._restored, {}
        if restored:
            self._window.extend((pairs, logs) for pairs, logs in restored["window"])
            self._first, self._last_step = restored["first"], restored["last_step"]
            self._best_margin = -math.inf if restored["best_margin"] is None else restored["best_margin"]
        path = Path(args.output_dir) / WARNINGS_FILE
        if not state.is_world_process_zero or not path.is_file():
            return
        if state.global_step == 0:
            path.unlink()
        else:  # warnings given before the run was resumed
            self.given.update({entry["name"]: entry["message"] for entry in read_lines(path)})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        is_first = self._first_step == 0 and state.global_step == 1
        if is_first and state.is_world_process_zero and self.has_reference:
            message = reference_is_not_the_start(self.first_means(), args.beta, has_dropout=not args.disable_dropout)
            self.say("reference_is_not_the_start", message, args, state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or "rewards/chosen" not in (logs or {}):
            return
        rows_per_step = args.train_batch_size * args.gradient_accumulation_steps * args.data_parallel_size
        self._window.append(((state.global_step - self._last_step) * rows_per_step, dict(logs)))
        self._last_step = state.global_step
        while sum(pairs for pairs, _ in self._window) - self._window[0][0] >= WINDOW_PAIRS:
            self._window.popleft()
        if sum(pairs for pairs, _ in self._window) < WINDOW_PAIRS:
            return
        means = _means(self._window)
        if self._first is None:
            self._first = means
        if not args.sync_ref_model:
            self._best_margin = max(self._best_margin, means["rewards/margins"])
        progress = Progress(means, self._first, self._best_margin, self.has_reference, args)
        for name, check in CHECKS.items():
            self.say(name, check(progress), args, state.global_step)

    def say(self, name: str, message: str | None, args: Any, step: int) -> None:
        """Gives a warning if there is a message and no warning of this name was given before."""
        if message is None or name in self.given:
            return
        self.given[name] = message
        logger.warning(f"Step {step}: {message}. (Shown once; training_warnings=False turns such warnings off.)")
        append_lines(Path(args.output_dir) / WARNINGS_FILE, [{"step": step, "name": name, "message": message}])


def _means(window: deque[tuple[int, Mapping[str, float]]]) -> dict[str, float]:
    """Means over the pairs of the window, of all metrics that its last entry has."""
    total = sum(pairs for pairs, _ in window)
    keys = [key for key in window[-1][1] if key.startswith(("rewards/", "logps/", "lengths/"))]
    return {key: sum(pairs * logs[key] for pairs, logs in window) / total for key in keys}
