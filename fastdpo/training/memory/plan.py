"""Plans how to train a model in a given amount of memory, with the longest pair for each setting, from a config alone.

In: a config and bytes. Out: a Plan for every candidate, including those that do not fit. Each plan comes from dry runs
of a step (`dry_model`) for a few lengths. Refuses LoRA if peft is not installed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from fastdpo.modeling.tiles import auto_tile_rows
from fastdpo.training.memory.dry_model import DryModel
from fastdpo.training.memory.dry_run import RowShape, StepPeak, assume_tiles, fake_mode
from fastdpo.training.memory.estimate import (
    CUDA_WORKSPACE_BYTES,
    MemoryEstimate,
    enable_checkpointing,
    estimate_step,
    model_bytes,
    planned_impl,
)
from fastdpo.training.memory.weightless import in_fewer_bits, weightless_model
from fastdpo.training.setup.model_kinds import text_part
from fastdpo.training.setup.optimizers import update_bytes

ROUNDING = 256  # tokens
MEASURED_TOKENS = (512, 8192, 131072)  # values between and beyond are on the lines through these points
REFINEMENTS, CLOSE = 5, 0.98  # dry runs at most, and the share of the memory at which no more are made
USABLE_SHARE = 0.95  # of the memory; the rest is for fragments of the allocator
CARDS = tuple(int(size * 1e9) for size in (8, 12, 16, 24, 32, 40, 48, 80, 96, 141))  # memory of usual GPUs, bytes


@dataclass(frozen=True)
class Settings:
    """One way to train the model."""

    method: str  # "full", "lora" or "qlora"
    checkpointing: bool
    reference: str  # "frozen", "cached" or "adapter"
    optim: str
    tiles: bool = False  # tile_rows="auto"
    offload: bool = False  # checkpoints in host memory
    weight_rounding: str = "nearest"  # another one for weights in bf16, see `updates/rounding.py`
    in_backward: bool = False  # whether the optimizer steps in backward; a step is one micro-batch then

    @property
    def needs_bitsandbytes(self) -> bool:
        return self.method == "qlora" or "bnb" in self.optim or "paged" in self.optim

    def options(self, tokens: int, lora_r: int) -> str:
        """The options for `fastdpo train`."""
        parts = ["--bf16 true", f"--gradient_checkpointing {str(self.checkpointing).lower()}"]
        parts += ["--tile_rows auto"] if self.tiles else []
        parts += ["--activation_offloading true"] if self.offload else []
        if self.method != "full":
            parts += ["--use_peft", f"--lora_r {lora_r}", '--model_init_kwargs \'{"dtype": "bfloat16"}\'']
        if self.method == "qlora":
            parts.append("--load_in_4bit")
        if self.weight_rounding != "nearest":
            parts += ['--model_init_kwargs \'{"dtype": "bfloat16"}\'', f"--weight_rounding {self.weight_rounding}"]
        parts += [f"--reference {self.reference}", f"--optim {self.optim}"]
        if self.in_backward:
            parts.append("--optimizer_in_backward --per_device_train_batch_size 1")
        else:
            parts.append(f"--max_tokens_per_microbatch {tokens}")
        return " ".join(parts)


# From full training, the fastest, to the method with the least memory. Full training keeps fp32 weights, or bf16
# weights with stochastic rounding. Of one method, the ways of keeping activations are in the order of the time that
# they cost: all, checkpoints, tiles, on the host.
CANDIDATES = [
    *(
        Settings("full", checkpointing, reference, optim)
        for optim in ("adamw_torch_fused", "adamw_bnb_8bit", "paged_adamw_8bit")
        for checkpointing in (False, True)
        for reference in ("frozen", "cached")
    ),
    *(Settings("full", True, "cached", "paged_adamw_8bit", tiles=True, offload=offload) for offload in (False, True)),
    *(
        Settings("full", True, "cached", "adamw_bnb_8bit", tiles, False, "stochastic", in_backward)
        for tiles, in_backward in ((False, False), (False, True), (True, True))
    ),
    *(
        Settings(method, checkpointing, "adapter", "adamw_torch_fused", tiles=tiles, offload=offload)
        for method in ("lora", "qlora")
        for checkpointing, tiles, offload in (
            (False, False, False),
            (True, False, False),
            (True, True, False),
            (True, True, True),
        )
    ),
]


Estimate = Callable[[Settings, int], MemoryEstimate]  # from settings and the tokens of a pair


@dataclass(frozen=True)
class Plan:
    """One way to train, with the size that fits."""

    settings: Settings
    tokens: int  # of the largest micro-batch that fits, which is the longest pair, prompt once; 0 where none does
    estimate: MemoryEstimate  # at so many tokens, or of a pair of ROUNDING tokens where nothing fits


def pair_tokens(max_length: int) -> int:
    """Tokens of a packed pair whose longer sequence has max_length: prompt of two thirds, two responses."""
    return math.ceil(max_length * 4 / 3)


def pair_shape(num_tokens: int) -> RowShape:
    """One pair: half of the tokens in the prompt, a quarter in each response."""
    prompt, chosen = num_tokens // 2, num_tokens // 2 + num_tokens // 4
    return RowShape(((0, chosen, 0, 0), (chosen, num_tokens, 0, prompt)), num_tokens - prompt)


class Estimates:
    """Estimates of every candidate. Dry runs are shared between settings, lengths and amounts of memory."""

    def __init__(self, config: Any, lora_r: int) -> None:
        models: dict[Any, Estimate | None] = {}
        built = cache(partial(_build, config, lora_r))
        self.candidates: list[tuple[Settings, Estimate]] = []  # without those that the model cannot run
        for settings in CANDIDATES:
            key = replace(settings, method="full" if settings.method == "full" else "lora", reference="", optim="")
            if key not in models:
                models[key] = _estimator(config, settings, lora_r, built)
            estimate = models[key]
            if estimate is not None:
                self.candidates.append((settings, estimate))

    def plans(self, memory: int, least: int) -> list[Plan]:
        """Every candidate with the largest micro-batch that fits into `memory` bytes; 0 tokens if `least` do not."""
        return [_plan(settings, estimate, memory * USABLE_SHARE, least) for settings, estimate in self.candidates]

    def at_length(self, tokens: int) -> list[Plan]:
        """Every candidate at a pair of so many tokens, whatever memory it takes."""
        return [Plan(settings, tokens, estimate(settings, tokens)) for settings, estimate in self.candidates]

    def longest(self, memories: Sequence[int]) -> list[tuple[Settings, list[int]]]:
        """Every candidate with the longest pair for each amount of memory, 0 where none fits.

        Read off the lines through three lengths, so that more amounts cost no dry runs. The pair that `plans` finds
        may be a little longer.
        """
        found = []
        for settings, estimate in self.candidates:
            known = [(tokens, estimate(settings, tokens).total) for tokens in (ROUNDING, *MEASURED_TOKENS[1:])]
            found.append((settings, [_on_lines(known, memory * USABLE_SHARE) for memory in memories]))
        return found


def smallest_card(needed: int) -> int | None:
    """The memory of the smallest usual GPU that takes so many bytes, in bytes; None if none does."""
    return next((card for card in CARDS if card * USABLE_SHARE >= needed), None)


def _on_lines(known: Sequence[tuple[int, int]], memory: float) -> int:
    """Tokens, in steps of ROUNDING, at which the line through (tokens, bytes) reaches the memory."""
    if memory < known[0][1]:
        return 0
    below, above = next((pair for pair in pairwise(known) if memory <= pair[1][1]), tuple(known[-2:]))
    slope = max(above[1] - below[1], 1) / (above[0] - below[0])
    return max(int(below[0] + (memory - below[1]) / slope) // ROUNDING * ROUNDING, ROUNDING)


def _plan(settings: Settings, estimate: Estimate, memory: float, least: int) -> Plan:
    def point(tokens: int) -> tuple[int, int]:
        return tokens, estimate(settings, tokens).total

    # dry runs take seconds: only those that the answer lies between are made
    few, middle, many = MEASURED_TOKENS
    if estimate(settings, 0).total > memory:
        return Plan(settings, 0, estimate(settings, least))
    below = point(middle)
    if (least > middle or memory < below[1]) and estimate(settings, least).total > memory:
        return Plan(settings, 0, estimate(settings, least))
    below, above = (below, point(many)) if memory > below[1] else (point(few), below)
    tokens = 0
    # memory is convex in tokens: values between two points lie below the line through them
    for _ in range(REFINEMENTS):
        slope = max(above[1] - below[1], 1) / (above[0] - below[0])
        guess = max(int(below[0] + (memory - below[1]) / slope) // ROUNDING * ROUNDING, 0)
        if guess < ROUNDING or guess == tokens:
            break
        total = estimate(settings, guess).total
        if total <= memory:
            tokens = max(tokens, guess)
            below = (guess, total)
            if total > CLOSE * memory or guess >= above[0]:
                break
        else:
            above = (guess, total)
            if guess <= below[0]:
                below = (0, min(below[1], total - 1))
    if tokens < least:
        return Plan(settings, 0, estimate(settings, least))
    return Plan(settings, tokens, estimate(settings, tokens))


_Built = tuple[nn.Module, int, int, int]


class _NoTiles(Exception):
    """The model's layers cannot run in tiles."""


def _estimator(
    config: Any, way: Settings, lora_r: int, built: Callable[[bool, str], _Built] | None = None
) -> Estimate | None:
    """Estimates by settings and tokens; settings that differ only in sums over parameters share dry runs. None if the
    model's layers cannot run in tiles.

    Args:
        built: `_build` for this config, which may give the same model again.
    """
    mode = fake_mode()
    build = partial(_build, config, lora_r) if built is None else built
    model, plain_bytes, four_bit_bytes, largest = build(way.method == "full", way.weight_rounding)
    of_update = partial(update_bytes, way.optim, weight_rounding=way.weight_rounding) if way.in_backward else None
    tile_rows = auto_tile_rows(getattr(text_part(config), "hidden_size", 0), "cuda")

    def prepare(dry: nn.Module) -> None:
        if way.tiles and not assume_tiles(dry, mode, tile_rows, torch.bfloat16):
            raise _NoTiles
        if way.checkpointing:
            enable_checkpointing(dry, {"offload": True} if way.offload else {})

    try:
        dry = DryModel(model, mode, prepare, offload=way.offload)
    except _NoTiles:
        return None
    peaks = {0: StepPeak(0, 0, 0, 0)}  # by tokens: without any, the weights and the optimizer's state are left

    def estimate(settings: Settings, tokens: int) -> MemoryEstimate:
        if tokens not in peaks:
            peaks[tokens] = dry.step(
                pair_shape(tokens),
                impl=planned_impl(),
                varlen=True,
                autocast=torch.bfloat16,
                accumulates=not way.in_backward,
                workspace_bytes=CUDA_WORKSPACE_BYTES,
                update_bytes=of_update,
            )
        reference = plain_bytes if settings.reference == "frozen" else 0
        sizes: dict[str, Any] = {"weight_bytes": plain_bytes, "reference_bytes": reference}
        sizes |= {"weight_rounding": way.weight_rounding, "in_backward": way.in_backward}
        result = estimate_step(model, peaks[tokens], optim=settings.optim, **sizes, on_gpu=True)
        if settings.method == "qlora":  # a layer at a time is turned back into bf16
            result = replace(result, weights=four_bit_bytes, casts=result.casts + largest)
        return result

    return estimate


def _build(config: Any, lora_r: int, full: bool, weight_rounding: str) -> _Built:
    """A model without storage; its bytes, those with a base in 4 bits, and those of its largest layer in bf16."""
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
    plain, (saved, largest) = model_bytes(model), in_fewer_bits(model, 4)
    return model, plain, plain - saved, largest
