"""Losses of single pairs against a reference: PairScores in, one loss per pair out.

In the docstrings c and r are the log-ratios of chosen and rejected, `log policy - log reference`, and s the logistic
function. Under an f-divergence c and r are f' of the ratios (`divergence`) in the losses that compare them. Losses that
average per token refuse scores without lengths.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo.losses.registry import loss
from fastdpo.losses.settings import LossConfig
from fastdpo.types import PairScores


@loss(smoothed=True, divergence=True)
def sigmoid(scores: PairScores, config: LossConfig) -> Tensor:
    """`-log s(beta (c - r))`, the likelihood of the preference under Bradley-Terry. DPO, arXiv 2305.18290, eq. 7.

    `label_smoothing` is the probability that a label is flipped: conservative DPO, as in the original release.
    """
    return smoothed_logistic(config.beta * scores.margins, config.label_smoothing)


@loss(per_token=True, divergence=True)
def sigmoid_norm(scores: PairScores, config: LossConfig) -> Tensor:
    """`sigmoid` on log-ratios averaged over the tokens of each response. Tulu 3, arXiv 2411.15124, its DPO-norm."""
    chosen, rejected = per_token(scores, scores.chosen_logratios, scores.rejected_logratios)
    return -F.logsigmoid(config.beta * (chosen - rejected))


@loss(divergence=True)
def hinge(scores: PairScores, config: LossConfig) -> Tensor:
    """`max(0, 1 - beta (c - r))`. SLiC-HF, arXiv 2305.10425; RSO, arXiv 2309.06657, uses this form."""
    return torch.relu(1 - config.beta * scores.margins)


@loss(per_token=True, divergence=True)
def ipo(scores: PairScores, config: LossConfig) -> Tensor:
    """Squared distance of the per-token margin from 1 / (2 beta). IPO, arXiv 2310.12036, eq. 17.

    Log-ratios are averaged over tokens, as TRL does after asking the paper's authors; `preference_loss` keeps the
    sums of the original DPO release.
    """
    chosen, rejected = per_token(scores, scores.chosen_logratios, scores.rejected_logratios)
    return (chosen - rejected - 1 / (2 * config.beta)) ** 2


@loss(smoothed=True, divergence=True)
def exo_pair(scores: PairScores, config: LossConfig) -> Tensor:
    """KL divergence between the policy's preference and the label (1 - e, e). EXO, arXiv 2402.00856, eq. 16.

    e is `label_smoothing`, > 0; the paper uses 1e-3.
    """
    logits = config.beta * scores.margins
    chosen = torch.sigmoid(logits) * (F.logsigmoid(logits) - math.log1p(-config.label_smoothing))
    rejected = torch.sigmoid(-logits) * (F.logsigmoid(-logits) - math.log(config.label_smoothing))
    return chosen + rejected


@loss()
def nca_pair(scores: PairScores, config: LossConfig) -> Tensor:
    """Noise contrastive alignment: acts on both rewards, not on their difference. NCA, arXiv 2402.05369."""
    chosen, rejected = config.beta * scores.chosen_logratios, config.beta * scores.rejected_logratios
    return -F.logsigmoid(chosen) - 0.5 * (F.logsigmoid(-chosen) + F.logsigmoid(-rejected))


@loss(smoothed=True, divergence=True)
def robust(scores: PairScores, config: LossConfig) -> Tensor:
    """`sigmoid`, unbiased if labels flip with probability `label_smoothing` < 1/2. arXiv 2403.00409."""
    logits, flipped = config.beta * scores.margins, config.label_smoothing
    return (flipped * F.logsigmoid(-logits) - (1 - flipped) * F.logsigmoid(logits)) / (1 - 2 * flipped)


@loss()
def bco_pair(scores: PairScores, config: LossConfig) -> Tensor:
    """Classifies single responses; the reward is the logit. BCO, arXiv 2404.04656, without its reward shift."""
    return -F.logsigmoid(config.beta * scores.chosen_logratios) - F.logsigmoid(-config.beta * scores.rejected_logratios)


@loss()
def sppo_hard(scores: PairScores, config: LossConfig) -> Tensor:
    """Squared distances of c from 1 / (2 beta) and of r from -1 / (2 beta). SPPO, arXiv 2405.00675, eq. 4.7.

    Hard: the chosen response wins with probability 1; the paper estimates this probability.
    """
    target = 1 / (2 * config.beta)
    return (scores.chosen_logratios - target) ** 2 + (scores.rejected_logratios + target) ** 2


@loss()
def apo_zero(scores: PairScores, config: LossConfig) -> Tensor:
    """Raises the chosen, lowers the rejected; use it for data better than the model. APO, arXiv 2408.06266, eq. 7."""
    return torch.sigmoid(-config.beta * scores.chosen_logratios) + torch.sigmoid(
        config.beta * scores.rejected_logratios
    )


@loss()
def apo_down(scores: PairScores, config: LossConfig) -> Tensor:
    """Lowers both, the rejected more; use it for data worse than the model. APO, arXiv 2408.06266, eq. 8."""
    return torch.sigmoid(config.beta * scores.chosen_logratios) + torch.sigmoid(-config.beta * scores.margins)


@loss(divergence=True, reads=("discopop_tau",))
def discopop(scores: PairScores, config: LossConfig) -> Tensor:
    """Logistic for negative margins, exponential for positive ones. DiscoPOP, arXiv 2406.08414, eq. 5.

    `discopop_tau` is the width of the step from one to the other, in units of beta * margin. The exponential is
    larger at 0, so a narrow step is a rise: below 0.1, as at TRL's default of 0.05, the loss grows with margins near 0.
    """
    logits = config.beta * scores.margins
    step = logits / config.discopop_tau
    exponential = torch.exp(F.logsigmoid(step) - logits)  # exp(-logits) s(step), which alone would be inf * 0
    return exponential - F.logsigmoid(logits) * torch.sigmoid(-step)


def smoothed_logistic(logits: Tensor, flipped: float) -> Tensor:
    """`-log s(logits)` with probability 1 - flipped, `-log s(-logits)` with probability flipped."""
    return -F.logsigmoid(logits) * (1 - flipped) - F.logsigmoid(-logits) * flipped


def per_token(scores: PairScores, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
    """Sums (B,) over chosen and rejected responses as means over tokens; a response without tokens gives 0.

    Raises:
        ValueError: the scores have no lengths.
    """
    if scores.chosen_lengths is None or scores.rejected_lengths is None:
        raise ValueError("PairScores must have chosen_lengths and rejected_lengths for a loss per token, got None")
    return chosen / scores.chosen_lengths.clamp(min=1), rejected / scores.rejected_lengths.clamp(min=1)
