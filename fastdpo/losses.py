"""Preference losses: one pure function each, from PairScores to one loss per pair, all named in LOSSES.

Every function takes `(scores, config)` and returns (B,) losses in nats-like units, differentiable in the policy's
log-probs. `config` is anything with the fields that the loss reads (`beta`, `label_smoothing`), usually a DPOConfig. A
reference-free run is one whose reference log-probs are zero; no loss needs to know.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo.types import PairScores


class LossConfig(Protocol):
    """The fields of DPOConfig that losses read."""

    beta: float
    label_smoothing: float


def sigmoid(scores: PairScores, config: LossConfig) -> Tensor:
    """Negative log-likelihood of the preference under Bradley-Terry. DPO, arXiv 2305.18290, eq. 7.

    `label_smoothing` is the probability that a label is flipped: conservative DPO, as in the original release.
    """
    logits = config.beta * scores.margins
    return -F.logsigmoid(logits) * (1 - config.label_smoothing) - F.logsigmoid(-logits) * config.label_smoothing


def hinge(scores: PairScores, config: LossConfig) -> Tensor:
    """Shortfall of the scaled margin below 1. SLiC-HF, arXiv 2305.10425; in this form RSO, arXiv 2309.06657."""
    return torch.relu(1 - config.beta * scores.margins)


def ipo(scores: PairScores, config: LossConfig) -> Tensor:
    """Squared distance of the per-token margin from 1 / (2 beta). IPO, arXiv 2310.12036, eq. 17.

    Log-ratios are averaged over tokens, as TRL does after asking the paper's authors; `preference_loss` keeps the
    sums of the original DPO release.
    """
    if scores.chosen_lengths is None or scores.rejected_lengths is None:
        raise ValueError(
            "loss_type 'ipo' averages per token: PairScores must carry chosen_lengths and rejected_lengths"
        )
    chosen = scores.chosen_logratios / scores.chosen_lengths.clamp(min=1)
    rejected = scores.rejected_logratios / scores.rejected_lengths.clamp(min=1)
    return (chosen - rejected - 1 / (2 * config.beta)) ** 2


LOSSES: dict[str, Callable[[PairScores, Any], Tensor]] = {"sigmoid": sigmoid, "hinge": hinge, "ipo": ipo}


def preference_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
    ipo: bool = False,
    reference_free: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of the original DPO release, with its signature and its results.

    Args:
        policy_chosen_logps: (B,) summed log-probs of the chosen responses under the policy, nats; the other three
            alike.
        beta: temperature of the implicit reward; the regularization tau where `ipo`.
        label_smoothing: probability that a label is flipped (conservative DPO); not used by ipo.
        ipo: squared loss on summed log-probs (arXiv 2310.12036, eq. 17 without the average over tokens).
        reference_free: leave the reference out of the loss; the rewards still use it.
    Returns:
        losses (B,), and detached chosen and rejected rewards `beta * (policy - reference)` (B,).
    """
    policy_logratios = policy_chosen_logps - policy_rejected_logps
    reference_logratios = 0.0 if reference_free else reference_chosen_logps - reference_rejected_logps
    margins = policy_logratios - reference_logratios
    if ipo:
        losses = (margins - 1 / (2 * beta)) ** 2
    else:
        logits = beta * margins
        losses = -F.logsigmoid(logits) * (1 - label_smoothing) - F.logsigmoid(-logits) * label_smoothing
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps).detach()
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps).detach()
    return losses, chosen_rewards, rejected_rewards
