"""The memory of a step on one GPU by settings, tokens and workspace, from dry runs of a model without weights.

In: a config and Settings. Out: an Estimator. Settings that differ only in sums over parameters share dry runs. Refuses
LoRA if peft is not installed, and tiles for a model whose layers cannot run in them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from fastdpo.modeling.tiles import auto_tile_rows
from fastdpo.ops.eager import default_workspace_bytes
from fastdpo.ops.engine import engine_of
from fastdpo.training.memory.card.settings import Settings
from fastdpo.training.memory.cluster.sizes import ModelSizes, model_sizes
from fastdpo.training.memory.dry_model import DryModel
from fastdpo.training.memory.dry_run import RowShape, StepPeak, assume_tiles, fake_mode
from fastdpo.training.memory.estimate import (
    CUDA_WORKSPACE_BYTES,
    MemoryEstimate,
    enable_checkpointing,
    estimate_step,
    head_sums_bytes,
    model_bytes,
    planned_impl,
)
from fastdpo.training.memory.quantized import in_fewer_bits
from fastdpo.training.memory.weightless import weightless_model
from fastdpo.training.setup.model_kinds import text_part
from fastdpo.training.setup.optimizers import update_bytes


def pair_tokens(max_length: int) -> int:
    """Tokens of a packed pair whose longer sequence has max_length: prompt of two thirds, two responses."""
    return math.ceil(max_length * 4 / 3)


def pair_shape(num_tokens: int) -> RowShape:
    """One pair: half of the tokens in the prompt, a quarter in each response."""
    prompt, chosen = num_tokens // 2, num_tokens // 2 + num_tokens // 4
    return RowShape(((0, chosen, 0, 0), (chosen, num_tokens, 0, prompt)), num_tokens - prompt)


@dataclass(frozen=True)
class PlannedModel:
    """A model without storage, prepared for a method, and its bytes."""

    model: nn.Module
    plain_bytes: int
    four_bit_bytes: int  # with its base in 4 bits
    largest_layer_bytes: int  # in bf16; a 4-bit base turns back a layer at a time
    head_sums_bytes: int  # fp32 sums of the head's gradient; 0 if it is frozen
    tile_rows: int  # of tile_rows="auto"
    sizes: ModelSizes | None  # None for a model that does not name its layers


def build(config: Any, lora_r: int, full: bool, weight_rounding: str) -> PlannedModel:
    """Raises:
    ValueError: LoRA is asked for, and peft is not installed.
    """
    if full:
        model = weightless_model(config, torch.float32 if weight_rounding == "nearest" else torch.bfloat16)
    else:
        try:
            from peft import LoraConfig
        except ImportError as error:
            raise ValueError('a plan with LoRA needs the peft package: pip install "fastdpo[peft]"') from error
        lora = LoraConfig(r=lora_r, target_modules="all-linear", task_type="CAUSAL_LM")
        model = weightless_model(config, torch.bfloat16, lora)
        model.enable_input_require_grads()
    try:
        sizes = model_sizes(model)
    except ValueError:  # its layers have no name
        sizes = None
    plain, (saved, largest) = model_bytes(model), in_fewer_bits(model, 4)
    tile_rows = auto_tile_rows(getattr(text_part(config), "hidden_size", 0), "cuda")
    return PlannedModel(model, plain, plain - saved, largest, head_sums_bytes(model), tile_rows, sizes)


class NoTiles(Exception):
    """The model's layers cannot run in tiles."""


class Estimator:
    """Estimates of a model whose activations are kept in one way.

    Args:
        way: what these settings have in common: all that a dry run depends on.

    Raises:
        NoTiles: `way` has tiles, and no layer of the model can run in them.
    """

    def __init__(self, planned: PlannedModel, way: Settings) -> None:
        self.planned, self._way, self._mode = planned, way, fake_mode()
        self._dry = DryModel(
            planned.model, self._mode, self._prepare, offload=way.offload, every_n_layers=way.every_n_layers
        )
        # by tokens and workspace; without tokens, the weights and the optimizer's state are left
        self._peaks: dict[tuple[int, int], StepPeak] = {}

    def _prepare(self, dry: nn.Module) -> None:
        way = self._way
        if way.tiles and not assume_tiles(dry, self._mode, self.planned.tile_rows, torch.bfloat16):
            raise NoTiles
        if way.checkpointing:
            every = {"every_n_layers": way.every_n_layers} if way.every_n_layers > 1 else {}
            enable_checkpointing(dry, {"offload": way.offload, **every})

    def __call__(
        self, settings: Settings, tokens: int, workspace_bytes: int | None = CUDA_WORKSPACE_BYTES
    ) -> MemoryEstimate:
        """At a micro-batch of so many tokens.

        Args:
            workspace_bytes: of the head op; None for the least that it takes by default.
        """
        planned, way = self.planned, self._way
        peak = self._peak(tokens, CUDA_WORKSPACE_BYTES if workspace_bytes is None else workspace_bytes)
        reference = planned.plain_bytes if settings.reference == "frozen" else 0
        sizes: dict[str, Any] = {"weight_bytes": planned.plain_bytes, "reference_bytes": reference}
        sizes |= {"weight_rounding": way.weight_rounding, "in_backward": way.in_backward}
        result = estimate_step(planned.model, peak, optim=settings.optim, **sizes, on_gpu=True)
        if settings.method == "qlora":
            casts = result.casts + planned.largest_layer_bytes
            result = replace(result, weights=planned.four_bit_bytes, casts=casts)
        return result

    def known_lengths(self) -> list[int]:
        """Tokens of the micro-batches whose estimate costs no further dry run."""
        return [tokens for tokens, workspace_bytes in self._peaks if workspace_bytes == CUDA_WORKSPACE_BYTES]

    def workspace(self, free: int) -> int | None:
        """What the head op takes by default if so many bytes are free for it; None if that does not depend on them."""
        engine = engine_of(planned_impl())
        if default_workspace_bytes(engine, self.planned.head_sums_bytes) == engine.workspace_bytes:
            return None
        return default_workspace_bytes(engine, self.planned.head_sums_bytes, free)

    def _peak(self, tokens: int, workspace_bytes: int) -> StepPeak:
        if tokens == 0:
            return StepPeak(0, 0, 0, 0)
        way = self._way
        of_update = partial(update_bytes, way.optim, weight_rounding=way.weight_rounding) if way.in_backward else None
        if (tokens, workspace_bytes) not in self._peaks:
            self._peaks[tokens, workspace_bytes] = self._dry.step(
                pair_shape(tokens),
                impl=planned_impl(),
                varlen=True,
                autocast=torch.bfloat16,
                accumulates=not way.in_backward,
                workspace_bytes=workspace_bytes,
                update_bytes=of_update,
            )
        return self._peaks[tokens, workspace_bytes]
