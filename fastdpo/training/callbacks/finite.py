"""Losses that are not finite: looked for once a step, and the micro-batch behind the first of them is saved.

Losses in as they are made, on the device; an error out, on all processes at once, and no weight has changed. Reading a
loss back waits for the whole step. So on a GPU the optimizer is told on the device, where it can be: fused AdamW and
its like leave weights and moments as they are in a step whose `found_inf` is 1. The host reads the same number when the
next step has been launched, or before it logs, evaluates or saves, and stops there: that step's optimizer has not run
either. Every other optimizer, and a gradient scaler, which has a use of its own for `found_inf`, are waited for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor
from transformers import Trainer

from fastdpo.training.memory.token_budget import steps_in_backward

_TOLD_ON_DEVICE = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)  # weights in one piece


@dataclass
class _Step:
    """What is on its way to the host: the losses of a step, and how many processes have one that is not finite."""

    losses: Tensor  # (n + 1,) on the host, the count last; valid once the event has come
    event: Any
    inputs: list[dict[str, Any]]
    number: int


class FiniteLosses:
    """Keeps losses and inputs of micro-batches until `check` looks, because reading a loss waits for the device."""

    def __init__(self) -> None:
        self.unchecked: list[tuple[Tensor, dict[str, Any]]] = []
        self._coming: _Step | None = None

    def add(self, loss: Tensor, inputs: dict[str, Any]) -> None:
        self.unchecked.append((loss.detach(), inputs))

    def check(self, trainer: Trainer) -> None:
        """To be called before the optimizer steps; every process must call it as often as the others.

        Raises:
            FloatingPointError: a loss since the last call is not finite, here or on another process; where it was not
                waited for, at the next call of this or of `settle`.
        """
        self.settle(trainer)
        optimizer = _optimizer_that_skips(trainer)
        unchecked, self.unchecked = self.unchecked, []
        device = trainer.args.device
        losses = torch.stack([loss for loss, _ in unchecked]) if unchecked else torch.zeros(1, device=device)
        num_stopping = (~losses.isfinite()).any().float()
        if trainer.args.world_size > 1:  # else the others would step, and then wait for this one
            num_stopping = trainer.accelerator.reduce(num_stopping, "sum")
        if optimizer is not None:
            optimizer.found_inf = num_stopping.clamp(max=1.0)
        losses, event = _to_host(torch.cat([losses.float(), num_stopping[None]]), wait=optimizer is None)
        self._coming = _Step(losses, event, [inputs for _, inputs in unchecked], trainer.state.global_step)
        if optimizer is None:
            self.settle(trainer)

    def settle(self, trainer: Trainer) -> None:
        """Looks at the step that was not waited for.

        Raises:
            FloatingPointError: one of its losses is not finite.
        """
        step, self._coming = self._coming, None
        if step is None:
            return
        if step.event is not None:
            step.event.synchronize()
        *losses, num_stopping = step.losses.tolist()
        if num_stopping == 0:
            return
        where = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), None)
        if where is None:
            raise FloatingPointError(
                f"the loss of another process is not finite at step {step.number}; no weight was changed"
            )
        args = trainer.args
        path = Path(args.output_dir) / f"nonfinite_batch_rank{args.process_index}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"inputs": step.inputs[where], "step": step.number}, path)
        raise FloatingPointError(
            f"the loss is {losses[where]} at step {step.number}; no weight was changed by this batch, which is saved in"
            f" {path}"
        )


def waiting_costs(device: torch.device) -> bool:
    """Whether numbers are read back from a device that works on while the host does."""
    return device.type == "cuda"


def _optimizer_that_skips(trainer: Trainer) -> Any:
    """The optimizer, if it leaves all weights as they are where its `found_inf` says so; else None."""
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # in accelerate's wrapper
    can_skip = getattr(optimizer, "_step_supports_amp_scaling", False) and not steps_in_backward(trainer)
    accelerator = trainer.accelerator
    is_plain = accelerator.distributed_type in _TOLD_ON_DEVICE and accelerator.scaler is None
    return optimizer if can_skip and is_plain and waiting_costs(trainer.args.device) else None


def _to_host(numbers: Tensor, *, wait: bool) -> tuple[Tensor, Any]:
    """The numbers on the host, and the event after which they are there."""
    if wait or not numbers.is_cuda:
        return numbers.cpu(), None
    host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    host.copy_(numbers, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event
