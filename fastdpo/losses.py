"""Preference losses: one pure function each, from PairScores to one loss per pair, all named in LOSSES.

Every function takes `(scores, config)` and returns (B,) losses in nats-like units, differentiable in the policy's
log-probs. `config` is anything with the fields that the loss reads (`beta`, `label_smoothing`, `discopop_tau`), usually
a DPOConfig. A reference-free run is one whose reference log-probs are zero; no loss needs to know. Names and formulas
are TRL's, so that configs carry over. In the docstrings c and r are the log-ratios of chosen and rejected.
"""

from __future__ import annotations

import math
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
    discopop_tau: float


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


def exo_pair(scores: PairScores, config: LossConfig) -> Tensor:
    """KL divergence of the policy's preference from the label's, (1 - e, e). EXO, arXiv 2402.00856, eq. 16.

    e is `label_smoothing`, > 0; the paper uses 1e-3.
    """
    logits = config.beta * scores.margins
    chosen = torch.sigmoid(logits) * (F.logsigmoid(logits) - math.log1p(-config.label_smoothing))
    rejected = torch.sigmoid(-logits) * (F.logsigmoid(-logits) - math.log(config.label_smoothing))
    return chosen + rejected


def nca_pair(scores: PairScores, config: LossConfig) -> Tensor:
    """Noise contrastive alignment of two responses: holds both rewards, not their difference. NCA, arXiv 2402.05369."""
    chosen, rejected = config.beta * scores.chosen_logratios, config.beta * scores.rejected_logratios
    return -F.logsigmoid(chosen) - 0.5 * (F.logsigmoid(-chosen) + F.logsigmoid(-rejected))


def robust(scores: PairScores, config: LossConfig) -> Tensor:
    """`sigmoid` made unbiased under labels flipped with probability `label_smoothing` < 1/2. arXiv 2403.00409."""
    logits, flipped = config.beta * scores.margins, config.label_smoothing
    return (flipped * F.logsigmoid(-logits) - (1 - flipped) * F.logsigmoid(logits)) / (1 - 2 * flipped)


def bco_pair(scores: PairScores, config: LossConfig) -> Tensor:
    """A classifier of single responses whose logit is the reward. BCO, arXiv 2404.04656, without its reward shift."""
    return -F.logsigmoid(config.beta * scores.chosen_logratios) - F.logsigmoid(-config.beta * scores.rejected_logratios)


def sppo_hard(scores: PairScores, config: LossConfig) -> Tensor:
    """Squared distances of c from 1 / (2 beta) and of r from -1 / (2 beta). SPPO, arXiv 2405.00675, eq. 4.7.

    Hard: the chosen response is taken to win with probability 1 where the paper estimates it.
    """
    target = 1 / (2 * config.beta)
    return (scores.chosen_logratios - target) ** 2 + (scores.rejected_logratios + target) ** 2


def apo_zero(scores: PairScores, config: LossConfig) -> Tensor:
    """Raises the chosen, lowers the rejected: for data better than the model. APO, arXiv 2408.06266, eq. 7."""
    return torch.sigmoid(-config.beta * scores.chosen_logratios) + torch.sigmoid(
        config.beta * scores.rejected_logratios
    )


def apo_down(scores: PairScores, config: LossConfig) -> Tensor:
    """Lowers both, the rejected more: for data worse than the model. APO, arXiv 2408.06266, eq. 8."""
    return torch.sigmoid(config.beta * scores.chosen_logratios) + torch.sigmoid(-config.beta * scores.margins)


def discopop(scores: PairScores, config: LossConfig) -> Tensor:
    """Logistic for negative margins, exponential for positive ones. DiscoPOP, arXiv 2406.08414, eq. 5.

    `discopop_tau` is the width of the step from one to the other, in units of beta * margin. The exponential is
    larger at 0, so a narrow step is a rise: below 0.1, as at TRL's default of 0.05, the loss grows with margins near 0.
    """
    logits = config.beta * scores.margins
    exponential = torch.sigmoid(logits / config.discopop_tau)
    return torch.exp(-logits) * exponential - F.logsigmoid(logits) * (1 - exponential)


LOSSES: dict[str, Callable[[PairScores, Any], Tensor]] = {
    "sigmoid": sigmoid,
    "hinge": hinge,
    "ipo": ipo,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "robust": robust,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
}
# Losses in which the loss of a pair depends on the other pairs of its batch: none of these is the sum of its parts, so
# their batches are never split, and their gradient is not made in forward.
BATCH_LOSSES: tuple[str, ...] = ()
SMOOTHED = ("sigmoid", "exo_pair", "robust")  # the losses that read label_smoothing


def check_loss_settings(loss_type: str, config: LossConfig) -> None:
    """Raises ValueError where `loss_type` is no loss, or cannot be computed with the numbers of `config`."""
    if loss_type not in LOSSES:
        raise ValueError(f"loss_type must be one of {sorted(LOSSES)}, got {loss_type!r}")
    if not 0 < config.beta < math.inf:
        raise ValueError(f"beta must be > 0 and finite, got {config.beta!r}")
    if not 0 <= config.label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {config.label_smoothing}")
    if config.label_smoothing > 0 and loss_type not in SMOOTHED:
        raise ValueError(
            f"label_smoothing must be 0 for loss_type {loss_type!r}, which has no flipped labels,"
            f" got {config.label_smoothing}"
        )
    if config.label_smoothing == 0 and loss_type == "exo_pair":
        raise ValueError("label_smoothing must be > 0 for loss_type 'exo_pair' (the paper uses 1e-3), got 0")
    if not 0 < config.discopop_tau < math.inf:
        raise ValueError(f"discopop_tau must be > 0 and finite, got {config.discopop_tau!r}")


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
