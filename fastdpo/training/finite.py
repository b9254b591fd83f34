"""Losses that are not finite: looked for once a step, and the micro-batch behind the first of them is saved.

Losses in as they are made, on the device; an error out, on all processes at once, before any weight has changed.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer


class FiniteLosses:
    """Keeps losses and inputs of micro-batches until `check` looks, because reading a loss waits for the device."""

    def __init__(self) -> None:
        self.unchecked: list[tuple[Tensor, dict[str, Any]]] = []

    def add(self, loss: Tensor, inputs: dict[str, Any]) -> None:
        self.unchecked.append((loss.detach(), inputs))

    def check(self, trainer: Trainer) -> None:
        """Every process must call it as often as the others.

        Raises:
            FloatingPointError: a loss since the last call is not finite, here or on another process.
        """
        unchecked, self.unchecked = self.unchecked, []
        losses = torch.stack([loss for loss, _ in unchecked]).tolist() if unchecked else []
        where = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), None)
        args, step = trainer.args, trainer.state.global_step
        num_stopping = int(where is not None)
        if args.world_size > 1:  # else the others would step, and then wait for this one
            num_stopping = int(trainer.accelerator.reduce(torch.tensor([num_stopping], device=args.device), "sum"))
        if num_stopping == 0:
            return
        if where is None:
            raise FloatingPointError(f"the loss of another process is not finite at step {step}; no weight was changed")
        path = Path(args.output_dir) / f"nonfinite_batch_rank{args.process_index}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"inputs": unchecked[where][1], "step": step}, path)
        raise FloatingPointError(
            f"the loss is {losses[where]} at step {step}; no weight was changed by this batch, which is saved in {path}"
        )
