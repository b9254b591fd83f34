"""UpdatingTrainer: ResumableTrainer whose optimizer may update one weight at a time, after backward or in it.

In: `weight_rounding`, `optimizer_in_backward` and `clipping_in_backward`. Out: the steps of a run. What cannot be
updated so is refused by `updates/checks.py`, before anything is trained.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastdpo.training.resuming import ResumableTrainer
from fastdpo.training.updates.checks import check_engine, updates_one_by_one
from fastdpo.training.updates.in_backward import StepInBackward
from fastdpo.training.updates.one_by_one import OneByOne


class UpdatingTrainer(ResumableTrainer):
    """Base of PackedTrainer. `watch_updates` must be called once the trainer is built."""

    _in_backward: StepInBackward | None = None  # the optimizer's step, if it is part of backward
    _is_measuring = False  # whether a forward and backward only measure the gradient; nothing is recorded then

    def watch_updates(self) -> None:
        """Prepares the steps in backward, whose last norm belongs into checkpoints.

        Raises:
            ValueError: an engine, which accelerate's settings may have chosen, updates the weights by itself.
        """
        check_engine(self.args, "DeepSpeed" if self.is_deepspeed_enabled else "FSDP" if self.is_fsdp_enabled else "")
        if self.args.optimizer_in_backward:
            self._in_backward = StepInBackward(self.args.clipping_in_backward, self.args.max_grad_norm)
            self.parts["in_backward"] = self._in_backward

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """As in Trainer; the optimizer updates weights one by one if they are rounded, or updated in backward."""
        optimizer = super().create_optimizer(model)
        if updates_one_by_one(self.args) and not isinstance(getattr(optimizer, "optimizer", optimizer), OneByOne):
            optimizer = self.optimizer = OneByOne(optimizer, self.args.weight_rounding, self.args.seed)
            if self._in_backward is not None:
                self._in_backward.attach(optimizer)
        return optimizer

    def _forward_and_backward(self, model: nn.Module, inputs: dict[str, Any], num_items: Tensor | int) -> Tensor:
        """The loss of one micro-batch after its backward, which may update the weights."""
        run = partial(super().training_step, model, inputs, num_items)
        return run() if self._in_backward is None else self._in_backward.step(run, partial(self._measured, run))

    def _measured(self, run: Callable[[], Tensor]) -> None:
        """Runs a forward and backward that leaves no metrics and no other random numbers behind."""
        device = self.args.device
        self._is_measuring = True
        try:
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                run()
        finally:
            self._is_measuring = False

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return super()._clip_grad_norm(model) if self._in_backward is None else self._in_backward.last_norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        in_backward = self._in_backward
        return super()._get_grad_norm(model, grad_norm) if in_backward is None else in_backward.last_norm
