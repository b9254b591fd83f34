"""Stops training at a loss that is not finite, before any weight changes, and saves its micro-batch.

In: the losses of each step, on the device. Out: a file for `fastdpo debug-batch`, and an error, on all processes at
once. Reading a loss waits for the whole step on the GPU, so the check avoids that wait if it can: fused AdamW and
similar optimizers skip a step if their `found_inf` is 1, and this number stays on the device. The host reads it after
it has launched the next step, or before it logs, evaluates or saves. By then neither step has changed a weight. With
other optimizers, and with a gradient scaler (which uses `found_inf` itself), the host waits in every step. Gradients
that overflow under fp16 are the scaler's: it skips the step and halves its scale, and the run goes on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, gather_object
from torch import Tensor
from transformers import Trainer

from fastdpo.training.memory.token_budget import steps_in_backward

SAVED_SETTINGS = ("bf16", "fp16", "impl", "attention_backend", "loss_type", "beta")  # with a bad batch
_TOLD_ON_DEVICE = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)  # weights not sharded


@dataclass
class _Step:
    """A copy to the host that may still run: the losses of a step, and the number of processes with a bad one."""

    losses: Tensor  # (n + 1,) on the host, the number last; valid after the event
    event: Any
    inputs: list[tuple[dict[str, Any], dict[str, Tensor] | None]]  # of each micro-batch, and its log-probs
    number: int


class FiniteLosses:
    """Keeps losses and inputs of micro-batches until `check` reads them, because reading a loss waits for the GPU."""

    def __init__(self) -> None:
        self.unchecked: list[tuple[Tensor, dict[str, Any], dict[str, Tensor] | None]] = []
        self._coming: _Step | None = None

    def add(self, loss: Tensor, inputs: dict[str, Any], sums: dict[str, Tensor] | None = None) -> None:
        """Adds a micro-batch: its loss, its inputs and the log-probs of its sequences."""
        self.unchecked.append((loss.detach(), inputs, sums))

    def check(self, trainer: Trainer) -> None:
        """Call this before the optimizer steps. Every process must call it equally often.

        Raises:
            FloatingPointError: a loss since the last call is not finite, on this or another process. Without waiting,
                the error comes at the next call of `check` or `settle`.
        """
        self.settle(trainer)
        optimizer = _optimizer_that_skips(trainer)
        unchecked, self.unchecked = self.unchecked, []
        device = trainer.args.device
        losses = torch.stack([loss for loss, *_ in unchecked]) if unchecked else torch.zeros(1, device=device)
        num_stopping = (~losses.isfinite()).any().float()
        if trainer.args.world_size > 1:  # otherwise the others would step, and then wait for this process forever
            num_stopping = trainer.accelerator.reduce(num_stopping, "sum")
        if optimizer is not None:
            optimizer.found_inf = num_stopping.clamp(max=1.0)
        losses, event = _to_host(torch.cat([losses.float(), num_stopping[None]]), wait=optimizer is None)
        inputs_and_sums = [(inputs, sums) for _, inputs, sums in unchecked]
        self._coming = _Step(losses, event, inputs_and_sums, trainer.state.global_step)
        if optimizer is None:
            self.settle(trainer)

    def settle(self, trainer: Trainer) -> None:
        """Reads the losses of the last step, if `check` did not wait for them.

        Raises:
            FloatingPointError: one of them is not finite.
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
        message = None if where is None else self._saved(trainer, step, where, losses[where])
        if trainer.args.world_size > 1:  # all raise the same
            message = next(text for text in gather_object([message]) if text is not None)
        raise FloatingPointError(message)

    def _saved(self, trainer: Trainer, step: _Step, where: int, loss: float) -> str:
        """Saves the micro-batch, and says where."""
        args = trainer.args
        path = Path(args.output_dir) / f"nonfinite_batch_rank{args.process_index}.pt"
        inputs, sums = step.inputs[where]
        found = f"the loss is {loss} at step {step.number}; no weight was changed."
        try:
            save_bad_batch(path, inputs, sums, step=step.number, loss=loss, args=args)
        except (OSError, RuntimeError) as error:  # a full disk, for example, of which torch makes a RuntimeError
            path.unlink(missing_ok=True)
            return f"{found} The batch cannot be saved in {path}: {error}"
        return (
            f"{found} The batch is saved in {path}: fastdpo debug-batch {path} --model MODEL shows where the first"
            " number went wrong"
        )


def save_bad_batch(
    path: Path, inputs: dict[str, Any], sums: dict[str, Tensor] | None, *, step: int, loss: float, args: Any
) -> None:
    """Saves a micro-batch for `fastdpo debug-batch`: tensors on the CPU and plain values, which load without unpickling
    any object (`torch.load(..., weights_only=True)`)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(args, name) for name in SAVED_SETTINGS if hasattr(args, name)}
    inputs = {**inputs, "shares": None}  # a single process replays it
    saved = {"inputs": inputs, "sums": sums or {}, "step": step, "loss": loss, "settings": settings}
    torch.save(_plain(saved), path)


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()  # a view would bring its whole buffer
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(item) for item in value)
    return value


def waiting_costs(device: torch.device) -> bool:
    """Whether the device runs asynchronously, so that reading a number from it waits."""
    return device.type == "cuda"


def _optimizer_that_skips(trainer: Trainer) -> Any:
    """The optimizer, if it skips a step when its `found_inf` is 1; else None."""
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # without accelerate's wrapper
    can_skip = getattr(optimizer, "_step_supports_amp_scaling", False) and not steps_in_backward(trainer)
    accelerator = trainer.accelerator
    is_plain = accelerator.distributed_type in _TOLD_ON_DEVICE and accelerator.scaler is None
    return optimizer if can_skip and is_plain and waiting_costs(trainer.args.device) else None


def _to_host(numbers: Tensor, *, wait: bool) -> tuple[Tensor, Any]:
    """The numbers on the host, and the event after which they are valid (None: at once)."""
    if wait or not numbers.is_cuda:
        return numbers.cpu(), None
    host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    host.copy_(numbers, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event
