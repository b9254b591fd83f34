"""Results of a beta sweep: figures with standard errors, the orderings that theory predicts, and the upper bound.

This module works on numbers only and uses no model.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdpo.alignment.generate import Samples


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error."""

    mean: float
    stderr: float

    @classmethod
    def of(cls, values: Tensor | Sequence[float]) -> Estimate:
        """Mean and standard error of N >= 2 independent values."""
        values = torch.as_tensor(values).double()
        if values.numel() < 2:
            raise ValueError(f"values must hold at least 2 numbers for a standard error, got {values.numel()}")
        return cls(values.mean().item(), values.std().item() / math.sqrt(values.numel()))

    def __sub__(self, other: Estimate) -> Estimate:
        """The difference, with its standard error for independent estimates."""
        return Estimate(self.mean - other.mean, math.hypot(self.stderr, other.stderr))

    def text(self, digits: int = 2) -> str:
        return f"{self.mean:.{digits}f} ± {self.stderr:.{digits}f}"


@dataclass(frozen=True)
class PolicyResult:
    """Measurements of one model on held-out prompts."""

    beta: float | None  # None: the reference
    accuracy: Estimate  # share of held-out pairs ranked as labelled; by implicit reward, the reference by its log-prob
    margin: Estimate  # implicit reward of chosen minus rejected, nats; 0 for the reference by definition
    reward: Estimate  # of samples
    kl: Estimate  # KL(policy || reference) of whole responses on the same samples, nats
    num_tokens: Estimate  # per sample
    samples: Samples
    rewards: tuple[float, ...]  # of each sample
    log_history: tuple[dict[str, Any], ...] = ()  # trainer.state.log_history

    @property
    def name(self) -> str:
        return "Reference" if self.beta is None else f"DPO, beta = {self.beta:g}"


@dataclass(frozen=True)
class Ordering:
    """A claim that one measured figure is above another."""

    claim: str
    difference: Estimate

    @property
    def num_stderrs(self) -> float:
        if self.difference.stderr > 0:
            return self.difference.mean / self.difference.stderr
        return math.copysign(math.inf, self.difference.mean) if self.difference.mean else 0.0

    @property
    def holds(self) -> bool:
        """Whether the claim holds by more than two standard errors."""
        return self.num_stderrs > 2


@dataclass(frozen=True)
class SweepResult:
    """The reference and one policy per beta, betas rising."""

    reference: PolicyResult
    policies: tuple[PolicyResult, ...]
    num_train_pairs: int
    num_heldout_pairs: int

    @property
    def models(self) -> tuple[PolicyResult, ...]:
        return (self.reference, *self.policies)

    def orderings(self) -> list[Ordering]:
        """The predicted orderings: accuracy and reward above the reference at every beta, KL falling as beta rises."""
        claims = []
        for policy in self.policies:
            claims.append(
                Ordering(f"{policy.name}: accuracy above the reference", policy.accuracy - self.reference.accuracy)
            )
            claims.append(Ordering(f"{policy.name}: reward above the reference", policy.reward - self.reference.reward))
        for smaller, larger in itertools.pairwise(self.policies):
            claims.append(
                Ordering(f"KL at beta = {smaller.beta:g} above beta = {larger.beta:g}", smaller.kl - larger.kl)
            )
        return claims


def best_frontier(
    rewards: Sequence[float], *, num_points: int = 60, min_samples: float = 50.0
) -> list[tuple[float, float]]:
    """(KL, reward) along the best possible frontier: the reference tilted by exp(reward / beta), for falling beta.

    The optimum of KL-constrained reward is pi_ref(y) exp(r(y) / beta) / Z (DPO paper, equation 4). It is estimated here
    by weighting samples of the reference, pooled over prompts. Pooling also lets the optimum prefer some prompts, so a
    real policy can only be below; both agree if the reference's rewards have the same distribution for all prompts.

    Args:
        rewards: rewards of independent samples of the reference.
        min_samples: the curve ends when the weights have fewer effective samples, (sum w)^2 / sum w^2.
    """
    r = torch.as_tensor(rewards, dtype=torch.float64)
    points = [(0.0, r.mean().item())]
    for tilt in torch.logspace(-2, 1.5, num_points, dtype=torch.float64):  # 1 / beta
        weights = torch.softmax(tilt * r, dim=0)
        if 1 / weights.square().sum() < min_samples:
            break
        reward = (weights * r).sum()
        log_z = torch.logsumexp(tilt * r, dim=0) - math.log(r.numel())
        points.append(((tilt * reward - log_z).item(), reward.item()))
    return points
