"""All losses by name. A decorator declares the facts about a loss at its function:

    @loss(smoothed=True, divergence=True)
    def sigmoid(scores: PairScores, config: LossConfig) -> Tensor:

Checks, trainer, command-line help and docs/losses.md read these facts; nothing else lists losses.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastdpo.types import PairScores

LossFunction = Callable[[PairScores, Any], Tensor]

UNITS = {  # the units over which a step's loss is a mean
    "pair": "pairs",
    "token": "chosen tokens",  # of the whole step; such a loss compares no responses
    "ranking": "rankings",  # whose stages are the pairs
    "batch": "a sorted batch",  # which is never split
}


@dataclass(frozen=True)
class Loss:
    """A loss function and the facts that a run needs about it. Callable like the function."""

    name: str
    function: LossFunction
    unit: str = "pair"  # a key of UNITS
    reference: bool = True  # compares with a reference model
    smoothed: bool = False  # reads label_smoothing
    per_token: bool = False  # compares means over tokens, so length by itself earns nothing
    likelihood: bool = False  # contains the mean log-prob of the optimizer step's chosen tokens
    divergence: bool = False  # compares both log-ratios alone, so an f-divergence may replace the KL
    reads: tuple[str, ...] = ()  # further settings of the config

    def __call__(self, scores: PairScores, config: Any) -> Tensor:
        return self.function(scores, config)

    @property
    def about(self) -> str:
        """The first paragraph of the function's docstring: formula, paper, equation."""
        return " ".join((inspect.getdoc(self.function) or "").split("\n\n")[0].split())

    @property
    def settings(self) -> tuple[str, ...]:
        """The settings that it reads besides beta."""
        return (*(("label_smoothing",) if self.smoothed else ()), *self.reads)

    @property
    def rewards_per_token(self) -> bool:
        """Whether its reward is beta times the log-prob per token."""
        return self.per_token and not self.reference


LOSSES: dict[str, Loss] = {}


def loss(**facts: Any) -> Callable[[LossFunction], LossFunction]:
    """Registers the function below it under its own name; the facts are those of `Loss`."""

    def register(function: LossFunction) -> LossFunction:
        made = Loss(function.__name__, function, **facts)
        assert made.unit in UNITS, f"unit must be one of {sorted(UNITS)}, got {made.unit!r}"
        LOSSES[made.name] = made
        return function

    return register


def losses_where(is_wanted: Callable[[Loss], bool], among: Iterable[str] | None = None) -> tuple[str, ...]:
    """Names of the losses for which `is_wanted` is true, among all or the given names, in order."""
    return tuple(name for name in (LOSSES if among is None else among) if is_wanted(LOSSES[name]))
