"""Moves the checkpoints of layers to host memory when training starts, after transformers has enabled checkpointing.

In: the model at the start of training. Out: the same model, with fastdpo's copies on a side stream in place of
transformers' on the compute stream.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from fastdpo.modeling.backbone import bare_model
from fastdpo.modeling.offload import CudaCopies, PlainCopies, offload_checkpoints


class OffloadAtStart(TrainerCallback):
    """Replaces the checkpoint function of every layer."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        copies = CudaCopies(args.device) if args.device.type == "cuda" else PlainCopies()
        self.store = offload_checkpoints(bare_model(model), copies)
