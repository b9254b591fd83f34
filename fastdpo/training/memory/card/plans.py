"""Plans how to train a model on one GPU, with the longest pair and the time of a step for each setting.

In: a config, and the memory of a GPU or the length of a pair. Out: a Plan for every candidate, including those that do
not fit, and the fastest of those that do. Each plan comes from dry runs of a step (`dry_model`) for a few lengths; no
weights are read. Refuses LoRA if peft is not installed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise
from typing import Any

from transformers import PreTrainedModel

from fastdpo.training.memory.card.estimates import Estimator, NoTiles, PlannedModel, build
from fastdpo.training.memory.card.seconds import StepSeconds, step_seconds
from fastdpo.training.memory.card.settings import CANDIDATES, Settings
from fastdpo.training.memory.cluster.hardware import Gpu
from fastdpo.training.memory.estimate import CUDA_WORKSPACE_BYTES, MemoryEstimate

ROUNDING = 256  # tokens
MEASURED_TOKENS = (512, 8192, 131072)  # values between and beyond are on the lines through these points
REFINEMENTS, CLOSE = 5, 0.98  # dry runs at most, and the share of the memory at which no more are made
USABLE_SHARE = 0.95  # of the memory; the rest is for fragments of the allocator
CARDS = tuple(int(size * 1e9) for size in (8, 12, 16, 24, 32, 40, 48, 80, 96, 141))  # memory of usual GPUs, bytes


@dataclass(frozen=True)
class Plan:
    """One way to train, with the size that fits."""

    settings: Settings
    tokens: int  # of the largest micro-batch that fits, which is the longest pair, prompt once; 0 where none does
    estimate: MemoryEstimate  # at so many tokens, or of a pair of ROUNDING tokens where nothing fits
    # of the head op, if its default depends on what is free: its default for what is left beside so many tokens
    workspace_bytes: int | None = None

    def options(self, lora_r: int) -> str:
        """The options for `fastdpo train`."""
        return self.settings.options(self.tokens, lora_r, self.workspace_bytes)


Timed = tuple[Plan, StepSeconds | None]


class Estimates:
    """Estimates of candidates. Dry runs are shared between settings, lengths and amounts of memory."""

    def __init__(self, config: Any, lora_r: int, candidates: Sequence[Settings] = tuple(CANDIDATES)) -> None:
        estimators: dict[Settings, Estimator | None] = {}
        built = cache(partial(build, config, lora_r))
        self.candidates: list[tuple[Settings, Estimator]] = []  # without those that cannot run
        for settings in candidates:
            if settings.every_n_layers > 1 and not hasattr(PreTrainedModel, "activation_checkpointing_enable"):
                continue  # transformers before 5.23
            is_full = settings.method == "full"
            way = replace(settings, method="full" if is_full else "lora", reference="")
            way = way if way.in_backward else replace(way, optim="")
            if way not in estimators:
                estimators[way] = _estimator(built(is_full, settings.weight_rounding), way)
            estimator = estimators[way]
            if estimator is not None:
                self.candidates.append((settings, estimator))

    def plans(self, memory: int, least: int) -> list[Plan]:
        """Every candidate with the largest micro-batch that fits into `memory` bytes; 0 tokens if `least` do not."""
        return [_plan(settings, estimate, memory * USABLE_SHARE, least) for settings, estimate in self.candidates]

    def at_length(self, tokens: int) -> list[Plan]:
        """Every candidate at a pair of so many tokens, whatever memory it takes, with the smallest workspace."""
        return [
            Plan(settings, tokens, estimate(settings, tokens), estimate.workspace(0))
            for settings, estimate in self.candidates
        ]

    def longest(self, memories: Sequence[int]) -> list[tuple[Settings, list[int]]]:
        """Every candidate with the longest pair for each amount of memory, 0 where none fits.

        Read off the lines through three lengths and those that have been estimated before, so that more amounts cost
        no dry runs. The pair that `plans` finds for one of them may be a little longer.
        """
        found = []
        for settings, estimate in self.candidates:
            lengths = sorted({ROUNDING, *MEASURED_TOKENS[1:], *estimate.known_lengths()})
            known = [(tokens, estimate(settings, tokens).total) for tokens in lengths]
            found.append((settings, [_on_lines(known, memory * USABLE_SHARE) for memory in memories]))
        return found

    def timed(self, plans: Sequence[Plan], gpu: Gpu, *, num_pairs: int, pair_tokens: int) -> list[Timed]:
        """Each plan with the time of a step of so many pairs; None if such a pair does not fit, or the model does not
        name its layers."""
        models = {settings: estimate.planned for settings, estimate in self.candidates}

        def seconds(plan: Plan) -> StepSeconds | None:
            planned = models[plan.settings]
            if plan.tokens < pair_tokens or planned.sizes is None:
                return None
            return step_seconds(
                planned.sizes,
                gpu,
                plan.settings,
                num_pairs=num_pairs,
                pair_tokens=pair_tokens,
                largest_microbatch=plan.tokens,
                tile_rows=planned.tile_rows,
                workspace_bytes=plan.workspace_bytes or CUDA_WORKSPACE_BYTES,
            )

        return [(plan, seconds(plan)) for plan in plans]


def _estimator(planned: PlannedModel, way: Settings) -> Estimator | None:
    try:
        return Estimator(planned, way)
    except NoTiles:
        return None


def fastest(plans: Sequence[Timed]) -> list[Plan]:
    """Of each method the plan to take: of those that update weights alike, the one whose step takes the least time.

    Updates are taken in the order of the table, which is the order of how little they round; those of which a plan
    takes the pair come first. Without times, the first plan counts.
    """
    found: dict[str, dict[tuple[str, str, bool], tuple[float, Plan]]] = {}
    for plan, seconds in plans:
        of_method = found.setdefault(plan.settings.method, {})
        known = of_method.get(plan.settings.update)
        total = math.inf if seconds is None else seconds.total
        if known is None or total < known[0]:
            of_method[plan.settings.update] = (total, plan)
    return [min(of_method.values(), key=lambda pair: math.isinf(pair[0]))[1] for of_method in found.values()]


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


def _plan(settings: Settings, estimate: Estimator, memory: float, least: int) -> Plan:
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
    found = estimate(settings, tokens)
    workspace = estimate.workspace(int(memory - found.total + CUDA_WORKSPACE_BYTES))
    return Plan(settings, tokens, estimate(settings, tokens, workspace), workspace)
