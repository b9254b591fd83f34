"""f-divergences instead of the KL divergence to the reference: PairScores in, PairScores with f' as log-ratios out.

DPO's reward is `beta log u` with the ratio `u = policy / reference`. The reward of f-DPO is `beta f'(u)` plus a term
that depends only on the prompt (arXiv 2309.16240, theorem 1). This term cancels in a difference, so only losses that
compare both sides can use f-divergences. Names and constants are TRL's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo.losses.settings import LossConfig
from fastdpo.types import PairScores

_MAX_EXPONENT = 80.0  # exp of it is finite in fp32


def reverse_kl(logratios: Tensor, config: LossConfig) -> Tensor:
    """f(u) = u log u, f' = log u + 1; the constant is dropped. This is DPO."""
    return logratios


def forward_kl(logratios: Tensor, config: LossConfig) -> Tensor:
    """f(u) = -log u, f' = -1 / u, shifted to 1 - 1 / u, which is 0 if policy and reference agree."""
    return -torch.expm1((-logratios).clamp(max=_MAX_EXPONENT))


def js_divergence(logratios: Tensor, config: LossConfig) -> Tensor:
    """f(u) = u log u - (u + 1) log((u + 1) / 2), f' = log(2u / (u + 1)), at most log 2."""
    return math.log(2) + F.logsigmoid(logratios)


def alpha_divergence(logratios: Tensor, config: LossConfig) -> Tensor:
    """f' = (u^(a - 1) - 1) / (a - 1) for `f_alpha_divergence_coef` a; its limit at a = 1 is `reverse_kl`."""
    rest = config.f_alpha_divergence_coef - 1.0
    if abs(rest) < 1e-6:
        return logratios
    return torch.expm1((rest * logratios).clamp(max=_MAX_EXPONENT)) / rest


DIVERGENCES: dict[str, Callable[[Tensor, LossConfig], Tensor]] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "js_divergence": js_divergence,
    "alpha_divergence": alpha_divergence,
}


def under_divergence(scores: PairScores, config: LossConfig) -> PairScores:
    """The scores with f' of both ratios as log-ratios."""
    if config.f_divergence_type == "reverse_kl":
        return scores
    derivative = DIVERGENCES[config.f_divergence_type]
    chosen, rejected = derivative(scores.chosen_logratios, config), derivative(scores.rejected_logratios, config)
    zeros = torch.zeros_like(chosen)
    return replace(
        scores,
        policy_chosen_logps=chosen,
        policy_rejected_logps=rejected,
        ref_chosen_logps=zeros,
        ref_rejected_logps=zeros,
    )
