"""ResumableTrainer: a Trainer whose runs end in the same weights whether or not they were stopped in between.

Trainer restores weights, optimizer, scheduler and random states, and skips the batches that are done. This class adds
what it lacks: metrics under way, the place in a stream that is read several times, the order of an epoch that comes
from torch's random state, the end of an epoch that a checkpoint was saved before, and a run that is already at its end.
`saving/progress.py` has the state.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl
from transformers.trainer_utils import SaveStrategy
from transformers.utils import logging

from fastdpo.metrics import MetricMeans
from fastdpo.references.adapters import is_peft_model
from fastdpo.training.inputs.streams import is_stream
from fastdpo.training.saving.disk import DiskFull, bytes_of_save, free_bytes, is_full
from fastdpo.training.saving.engines import kind_of, load_optimizer, own_kind
from fastdpo.training.saving.manifest import EarlyChecksums, size_of, write_manifest
from fastdpo.training.saving.progress import (
    Part,
    Progress,
    as_hex,
    from_hex,
    load_progress,
    load_random_states,
    random_states,
    save_progress,
    set_random_states,
)
from fastdpo.training.saving.run_state import StateWriter
from fastdpo.training.saving.signals import EvaluationInterrupted, StopOnSignal, Stopped, spare_workers
from fastdpo.training.saving.staging import UNFINISHED, commit, rotate
from fastdpo.training.settings.engine import EngineConfig

logger = logging.get_logger(__name__)


def _to_numbered_cpu(storage: Any, location: str) -> Any:
    """Several processes without GPUs have the devices cpu:0, cpu:1, ..., to which torch.load by itself moves nothing;
    transformers 5.17 asks it to when it loads the optimizer."""
    return storage if location.startswith("cpu:") else None


torch.serialization.register_package(15, lambda storage: None, _to_numbered_cpu)  # torch's own: 10, 20, ...

SECONDS_BETWEEN_TRIES = 30.0  # of a save on a full disk


class SavedPart(Protocol):
    """A part of a run with a file of its own in a checkpoint."""

    def save(self, folder: str) -> None: ...

    def load(self, folder: str) -> None: ...


class ResumableTrainer(Trainer):
    """Base of PackedTrainer. `watch_progress` must be called once the trainer is built."""

    train_means: MetricMeans  # since the last log
    args: EngineConfig
    control: TrainerControl
    parts: dict[str, Part]  # parts of the run whose state is in every checkpoint, by name
    restored: list[SavedPart]
    _num_train_tokens: int  # since the last log
    _resumed_from: str | None = None  # until the random states of this checkpoint are loaded
    _resumed: Progress | None = None  # the progress in it
    _stops_at_once = False  # the checkpoint is at the end of training
    _order_state = ""  # as in Progress
    _has_ended_epoch = False  # whether the last event is the end of an epoch
    _last_step: tuple[float | None, float | None] = (None, None)  # its grad_norm and learning rate
    _left: tuple[bool, bool] = (False, False)  # whether an evaluation and a save are left to do, as in Progress
    _stop_on_signal: StopOnSignal | None = None
    _can_interrupt = False  # whether this evaluation may end early
    _is_staging = False  # whether a checkpoint is being written
    _pushes = False  # whether it is pushed to the Hub then
    _saved_step: int | None = None  # of the last checkpoint
    _saved_bytes: int | None = None  # of all its files

    def watch_progress(self) -> None:
        """Adds the callback that keeps track of the place in the run."""
        self.parts, self.restored, self.checksums, self.state_writer = {}, [], EarlyChecksums(), StateWriter()
        self.add_callback(_Place(self))

    # The place in the data

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        """As in Trainer: the epoch to begin with, and the batches of it to skip."""
        settings = max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        place = super()._init_training_state(*settings)
        self._resumed_from, self._resumed, self._stops_at_once = resume_from_checkpoint, None, False
        self._last_step = (None, None)
        if resume_from_checkpoint is None or self.state.global_step == 0:
            return place
        progress = self._resumed = load_progress(resume_from_checkpoint, self.args.process_index, self.args.world_size)
        self._restore_callbacks()
        for name, state in {} if progress is None else progress.parts.items():
            if name in self.parts:
                self.parts[name].restore(state)
        step, num_batches = self.state.global_step, num_update_steps_per_epoch * self.args.gradient_accumulation_steps
        is_streamed = is_stream(self.train_dataset)
        self._stops_at_once = step >= max_steps or (progress is not None and progress.is_stopping)
        is_at_end = self._stops_at_once or (not is_streamed and step % num_update_steps_per_epoch == 0)
        num_passes = (step - 1) // num_update_steps_per_epoch
        if is_streamed and progress is not None:
            num_passes = progress.num_passes
            place = num_passes, 0 if self.args.ignore_data_skip else self._batches_done(progress)
        if is_at_end and progress is not None and not progress.has_ended_epoch:
            return num_passes, num_batches  # the last epoch without its steps: its end is still to come
        return (num_train_epochs, 0) if self._stops_at_once else place

    def _batches_done(self, progress: Progress) -> int:
        """The batches of a pass that are done; with another number of processes, a step may have others."""
        if progress.num_accumulated == 0:
            return progress.num_batches
        return progress.num_batches // progress.num_accumulated * self.args.gradient_accumulation_steps

    def _is_of_another_engine(self, checkpoint: str) -> bool:
        return kind_of(checkpoint) != own_kind(self)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self._is_of_another_engine(checkpoint):
            load_optimizer(checkpoint, self)
        else:
            super()._load_optimizer_and_scheduler(checkpoint)

    def _restore_callbacks(self) -> None:
        """Gives callbacks such as EarlyStoppingCallback the counters that Trainer saved with the checkpoint."""
        for name, states in self.state.stateful_callbacks.items():
            found = [callback for callback in self.callback_handler.callbacks if type(callback).__name__ == name]
            # callbacks of one class have a list; in checkpoints of Trainer's own, states of earlier saves precede
            last = states[-len(found) :] if isinstance(states, list) else [states]
            for callback, state in zip(found, last, strict=False):
                for attribute, value in state.get("attributes", {}).items():
                    setattr(callback, attribute, value)

    def begin_training(self) -> None:
        """Restores what Trainer has just set to zero."""
        progress = self._resumed
        if progress is None:
            return
        self._tr_loss = torch.tensor(progress.loss_sum, device=self.args.device)
        self._total_loss_scalar = progress.total_loss
        self._globalstep_last_logged = progress.last_logged_step
        self.train_means.restore(progress.means, self.args.device)
        self._num_train_tokens = progress.num_tokens
        self._last_step = (progress.grad_norm, progress.learning_rate)

    def begin_epoch(self) -> None:
        """Gives the resumed epoch the order it had."""
        if self._resumed_from is not None and self._resumed is not None:
            torch.set_rng_state(from_hex(self._resumed.order_state))
        self._order_state = as_hex(torch.get_rng_state())

    def end_epoch(self, control: TrainerControl) -> None:
        self._has_ended_epoch = True
        if self._resumed_from is not None:  # no step was left, so that Trainer has not loaded them
            self._load_rng_state(self._resumed_from)
        control.should_training_stop |= self._stops_at_once

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Loads the random states, once the batches that are done are skipped, and does what is left at their step."""
        if checkpoint is not None and self._resumed is not None and self._resumed.num_processes != self.args.world_size:
            load_random_states(checkpoint)
        else:
            super()._load_rng_state(checkpoint)
        is_first, self._resumed_from = self._resumed_from is not None, None
        progress = self._resumed
        if not is_first or progress is None:
            return
        if progress.has_ended_epoch and not is_stream(self.train_dataset):
            self._order_state = as_hex(torch.get_rng_state())
        if progress.evaluates:
            self._evaluate_late(saves=progress.saves)

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in Trainer, but a resumed run does not repeat the evaluation at the start (eval_on_start)."""
        is_at_start = kwargs.get("skip_scheduler", False)
        return {} if is_at_start and self.state.global_step > 0 else super()._evaluate(*args, **kwargs)

    def _evaluate_late(self, *, saves: bool) -> None:
        """The evaluation of the checkpoint's step, which a signal interrupted."""
        control = self.control
        flags = control.should_log, control.should_evaluate, control.should_save
        control.should_log, control.should_evaluate, control.should_save = False, True, saves
        epoch = self.state.epoch or 0.0
        self._maybe_log_save_evaluate(self._tr_loss, None, self.model_wrapped, None, epoch, None, time.time())
        control = self.control
        control.should_log, control.should_evaluate, control.should_save = flags

    # Signals

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer. Stops on signals if StopOnSignal is among the callbacks."""
        found = self._signal_callbacks()
        self._stop_on_signal = found[0] if found else None
        self._saved_step, self._left = None, (False, False)
        with found[0].training() if found else nullcontext():
            output = super().train(resume_from_checkpoint, *args, **kwargs)
            if found and found[0].is_asked():  # after the last step
                if self._saved_step != self.state.global_step and not self.args.load_best_model_at_end:
                    self._save_checkpoint(self.model, None)
                found[0].stop(self._checkpoint_path(None), is_main=self.is_world_process_zero())
        return output

    def _signal_callbacks(self) -> list[StopOnSignal]:
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, StopOnSignal)]

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()
        return spare_workers(loader) if self._signal_callbacks() else loader

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        loader = super().get_eval_dataloader(eval_dataset)
        return spare_workers(loader) if self._signal_callbacks() else loader

    def check_interrupted(self) -> None:
        """Ends an evaluation within training if a signal came. Call it at every batch.

        Raises:
            EvaluationInterrupted: a process got a signal.
        """
        if self._can_interrupt and self._stop_on_signal is not None and self._stop_on_signal.is_asked():
            raise EvaluationInterrupted

    def _maybe_log_save_evaluate(
        self,
        tr_loss: torch.Tensor,
        grad_norm: Any,
        model: nn.Module,
        trial: Any,
        epoch: float,
        ignore_keys_for_eval: list[str] | None,
        start_time: float,
        learning_rate: float | None = None,
    ) -> None:
        if learning_rate is None:  # the end of an epoch in which no step was left
            grad_norm, learning_rate = self._last_step
        self._last_step = (grad_norm, learning_rate)

        def run() -> None:
            where = model, trial, epoch, ignore_keys_for_eval, start_time
            super(ResumableTrainer, self)._maybe_log_save_evaluate(tr_loss, grad_norm, *where, learning_rate)

        if self._stop_on_signal is None:
            run()
        else:
            self._run_until_stopped(self._stop_on_signal, run, model, trial)

    def _run_until_stopped(self, stop: StopOnSignal, run: Callable[[], None], model: nn.Module, trial: Any) -> None:
        """Logs, evaluates and saves at the end of a step. If a signal came, leaves out the evaluation, saves and stops.

        Raises:
            Stopped: a process got a signal.
        """
        evaluates, saves = self.control.should_evaluate, self.control.should_save
        states = random_states() if evaluates else None
        is_interrupted = False
        if stop.is_asked():
            self.control.should_evaluate = self.control.should_save = False
            run()
            is_interrupted = evaluates
        else:
            self._can_interrupt = True
            try:
                run()
            except EvaluationInterrupted:
                assert states is not None
                set_random_states(states)
                is_interrupted = True
            finally:
                self._can_interrupt = False
            if not is_interrupted and not ((evaluates or saves) and stop.is_asked()):
                return
        if is_interrupted and self._has_ended_epoch:  # the resumed run ends the epoch again
            self._has_ended_epoch = False
        elif is_interrupted:
            self._left = (True, saves)
        if is_interrupted or self._saved_step != self.state.global_step:
            self._save_checkpoint(model, trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        stop.stop(self._checkpoint_path(trial), is_main=self.is_world_process_zero())

    # Saving

    def _checkpoint_path(self, trial: Any) -> Path:
        return Path(super()._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"

    def _get_output_dir(self, trial: Any) -> str:
        """The folder of the run; while a checkpoint is written, the folder in which it becomes whole."""
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, UNFINISHED) if self._is_staging else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Saves as Trainer does, beside the checkpoint's place, and renames the folder once its manifest is written.

        Raises:
            DiskFull: the checkpoint does not fit. Those before it are unchanged.
        """
        final = self._checkpoint_path(trial)
        write = partial(self._write_checkpoint, final, model, trial)
        self.save_with_space(write, final.name, final.parent, self._bytes_needed)
        self._saved_step, self._saved_bytes = self.state.global_step, size_of(final) if final.is_dir() else None
        if self._pushes:
            self._pushes = False
            super()._push_from_checkpoint(str(final))
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate(final.parent, self.args.save_total_limit, [final] if best is None else [Path(best), final])

    def _write_checkpoint(self, final: Path, model: nn.Module, trial: Any) -> None:
        """Writes the checkpoint and gives it its place. Every step ends on all processes before the next begins."""
        staged = final.parent / UNFINISHED / final.name

        def prepare() -> None:
            shutil.rmtree(staged.parent, ignore_errors=True)
            needed, free = self._bytes_needed(), free_bytes(final.parent)
            if free < needed:
                raise DiskFull(final.name, final.parent, needed, free)

        def finish() -> None:
            for part in self.restored:
                part.save(str(staged))
            self.state_writer.write(self.state, staged / "trainer_state.json")
            write_manifest(staged, self.checksums)
            commit(staged, final)
            shutil.rmtree(staged.parent, ignore_errors=True)

        best = self.state.best_model_checkpoint
        for states in self.state.stateful_callbacks.values():
            if isinstance(states, list):
                states.clear()  # Trainer appends those of now
        self._on_all_processes(prepare if self.args.should_save else None)
        self._is_staging = True
        try:
            with self.state_writer.alone(self.state):  # it is written once, in `finish`
                self._on_all_processes(partial(super()._save_checkpoint, model, trial))
        finally:
            self._is_staging = False
            self.state.best_model_checkpoint = best
        self._choose_best(final)
        self._on_all_processes(finish if self.args.should_save else None)

    def save_with_space(
        self, save: Callable[[], None], what: str, folder: Path, bytes_needed: Callable[[], int]
    ) -> None:
        """Calls `save`, which writes into UNFINISHED in the folder; again if the disk is full and the run waits.

        Raises:
            DiskFull: the disk is full, and the run does not wait. No part of the save is left.
        """
        while not self._is_saved(save, what, folder, bytes_needed):
            self._wait_for_space(what, folder, bytes_needed())

    def _is_saved(self, save: Callable[[], None], what: str, folder: Path, bytes_needed: Callable[[], int]) -> bool:
        """Whether the save succeeded; False if the disk is full and the run waits for space."""
        try:
            save()
            return True
        except Exception as error:
            self.checksums.forget()
            if self.args.should_save:
                shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
            if not is_full(error):
                raise
            if self.args.on_full_disk == "wait":
                return False
            if isinstance(error, DiskFull):
                raise
            raise DiskFull(what, folder, bytes_needed(), free_bytes(folder)) from error

    def _wait_for_space(self, what: str, folder: Path, needed: int) -> None:
        if not self.args.should_save:
            return  # this process waits for the others when it tries again
        logger.warning(f"{DiskFull(what, folder, needed, free_bytes(folder))}. Waiting (on_full_disk)")
        while True:
            time.sleep(SECONDS_BETWEEN_TRIES)
            if self._stop_on_signal is not None and self._stop_on_signal.received is not None:
                raise Stopped(128 + self._stop_on_signal.received)
            if free_bytes(folder) >= needed:
                return

    def _bytes_needed(self) -> int:
        """Of the next checkpoint: as many as the last one, or an estimate."""
        if self._saved_bytes is not None:
            return self._saved_bytes
        return bytes_of_save(self.model, self.optimizer, trained_only=is_peft_model(self.model))

    def _on_all_processes(self, step: Callable[[], None] | None) -> None:
        """Runs a step of a save. Raises on all processes if it fails on one, so that none waits for another forever."""
        error: Exception | None = None
        try:
            if step is not None:
                step()
        except Exception as raised:
            error = raised
        code = 0 if error is None else 1 if is_full(error) else 2
        if self.args.world_size > 1:
            code = int(self.accelerator.gather(torch.tensor([code], device=self.args.device)).max())
        if error is not None:
            raise error
        if code > 0:
            raise OSError(errno.ENOSPC if code == 1 else errno.EIO, "another process could not save the checkpoint")

    def _choose_best(self, final: Path) -> None:
        """As Trainer does, which looks for the best checkpoint in the folder it writes to."""
        best = self.state.best_global_step
        by_metric = self.args.save_strategy in (SaveStrategy.STEPS, SaveStrategy.EPOCH, SaveStrategy.BEST)
        if best and by_metric:
            folder = final.parent / f"checkpoint-{best}"
            if best == self.state.global_step or folder.exists():
                self.state.best_model_checkpoint = str(folder)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Trainer pushes a checkpoint while it writes it; here it first gets its place."""
        self._pushes = True

    def progress(self) -> Progress:
        """The state of this process that belongs into a checkpoint."""
        passes = self.state.epoch or 0.0
        num_passes = max(math.ceil(passes) - 1, 0)
        num_batches = round((passes - num_passes) * self.state.max_steps * self.args.gradient_accumulation_steps)
        grad_norm, learning_rate = self._last_step
        return Progress(
            num_processes=self.args.world_size,
            rows_per_step=self.get_total_train_batch_size(self.args),
            num_accumulated=self.args.gradient_accumulation_steps,
            loss_sum=self._tr_loss.item(),
            total_loss=self._total_loss_scalar,
            last_logged_step=self._globalstep_last_logged,
            means=self.train_means.state(),
            num_tokens=self._num_train_tokens,
            grad_norm=None if grad_norm is None else float(grad_norm),
            learning_rate=learning_rate,
            order_state=self._order_state,
            num_passes=num_passes,
            num_batches=num_batches,
            is_stopping=self.control.should_training_stop and self.state.global_step < self.state.max_steps,
            has_ended_epoch=self._has_ended_epoch,
            evaluates=self._left[0],
            saves=self._left[1],
            parts={name: part.state() for name, part in self.parts.items()},
        )

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        save_progress(self.progress(), output_dir, self.args.process_index)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "train_loss" in logs and self._resumed is not None:  # Trainer divides by the steps since the resume
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, start_time)


class _Place(TrainerCallback):
    """Tells the trainer where in the run it is."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.begin_training()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.begin_epoch()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._has_ended_epoch = False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.end_epoch(control)
