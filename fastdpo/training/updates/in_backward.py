"""The optimizer's step inside backward: a weight is updated as soon as its gradient is whole, and the gradient dropped.

In: an optimizer and the clipping. Out: updated weights after each backward; at no time does more than one layer's
gradients exist. Clipping by the norm of the whole gradient needs that norm before the first weight changes:

previous_norm: scales by the norm of the step before, which is no more work. The first step runs its forward and
    backward twice. The norm of a step is known after it, and logged.
two_passes: every step runs forward and backward twice, first for the norm. This is exact clipping, for twice the time.

Gradients of several micro-batches never meet, so there can be no accumulation (`check_updates` refuses it).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastdpo.training.updates.one_by_one import OneByOne

CLIPPINGS = ("previous_norm", "two_passes")


class StepInBackward:
    """Updates the weights of an optimizer in backward, once it is attached.

    Args:
        clipping: one of CLIPPINGS.
        max_norm: of the gradient; 0 does not clip.
    """

    def __init__(self, clipping: str, max_norm: float) -> None:
        self.clipping, self.max_norm = clipping, max_norm
        self.last_norm: Tensor | float | None = None  # of the gradient of the last step, before clipping
        self._optimizer: OneByOne | None = None
        self._squares: Tensor | None = None  # sum over the weights so far
        self._factor: Tensor | None = None  # of the gradients of this step
        self._only_measures = False
        self._is_on = False

    def attach(self, optimizer: OneByOne) -> None:
        """Registers the hooks of all weights of the optimizer."""
        self._optimizer = optimizer
        for parameter in optimizer.parameters():
            parameter.register_post_accumulate_grad_hook(self._is_whole)

    def step(self, run: Callable[[], Tensor], measure: Callable[[], Any]) -> Tensor:
        """The loss of `run`, a forward and backward in which weights are updated.

        Args:
            measure: the same forward and backward, whose results are not recorded; run where the norm must be known.
        """
        norm = self.last_norm
        if self.max_norm > 0 and (self.clipping == "two_passes" or norm is None):
            norm = self._pass(measure, only_measures=True)[1]
        self._factor = None
        if self.max_norm > 0 and norm is not None:
            self._factor = (self.max_norm / (torch.as_tensor(norm) + 1e-6)).clamp(max=1.0)  # as torch's clip_grad_norm_
        loss, self.last_norm = self._pass(run, only_measures=False)
        return loss

    def _pass(self, run: Callable[[], Any], *, only_measures: bool) -> tuple[Any, Tensor]:
        """What `run` returns, and the norm of the gradient."""
        self._only_measures, self._squares, self._is_on = only_measures, None, True
        try:
            result = run()
        finally:
            self._is_on = False
        squares = torch.zeros(()) if self._squares is None else self._squares
        return result, squares.sqrt()

    @torch.no_grad()
    def _is_whole(self, parameter: nn.Parameter) -> None:
        if not self._is_on:  # a backward that is no step, such as the measurement of a token limit
            return
        grad, parameter.grad = parameter.grad, None
        assert grad is not None
        square = torch.linalg.vector_norm(grad, dtype=torch.promote_types(grad.dtype, torch.float32)).square()
        self._squares = square if self._squares is None else self._squares + square.to(self._squares.device)
        if not self._only_measures:
            assert self._optimizer is not None
            factor = None if self._factor is None else self._factor.to(grad.device)
            self._optimizer.update(parameter, grad, factor)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"last_norm": None if self.last_norm is None else repr(float(self.last_norm))}

    def restore(self, state: dict[str, Any]) -> None:
        self.last_norm = None if state["last_norm"] is None else float(state["last_norm"])
