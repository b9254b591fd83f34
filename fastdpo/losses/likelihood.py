"""Losses on the policy's own log-probs, without a reference: PairScores in, one loss per pair out.

A mean over tokens covers the chosen tokens of the whole optimizer step, `PairScores.mean_chosen_length` per pair, and
so does not depend on how the step is split: the sum over pairs, divided by the number of pairs, is the negative
log-prob per token. Refuses scores without lengths.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo.losses.pairwise import per_token, smoothed_logistic
from fastdpo.losses.registry import loss
from fastdpo.losses.settings import LossConfig
from fastdpo.types import PairScores


@loss(unit="token", likelihood=True)
def sft(scores: PairScores, config: LossConfig) -> Tensor:
    """Negative log-prob per token of the chosen responses, a mean over all their tokens.

    The Preferred-FT baseline of DPO (arXiv 2305.18290, sec. 6), and the term that keeps chosen log-probs from falling
    (RPO, arXiv 2404.19733): `loss_type=["sigmoid", "sft"]`.
    """
    if scores.chosen_lengths is None:
        raise ValueError("PairScores must have chosen_lengths for a loss that is a mean over tokens, got None")
    mean_length = scores.mean_chosen_length
    if mean_length is None:
        mean_length = scores.chosen_lengths.double().mean()
    sums = scores.policy_chosen_logps if scores.chosen_sums is None else scores.chosen_sums
    return -sums / mean_length.clamp(min=1).to(sums.dtype)


@loss(reference=False, smoothed=True, per_token=True, reads=("gamma_beta_ratio",))
def simpo(scores: PairScores, config: LossConfig) -> Tensor:
    """`-log s(beta (p - q - gamma / beta))`, p and q the log-probs per token. SimPO, arXiv 2405.14734, eq. 6.

    `gamma_beta_ratio` is gamma / beta, as in the authors' code, the margin per token that is asked for. The paper uses
    beta from 2 to 10, and `label_smoothing` is their code's.
    """
    chosen, rejected = per_token(scores, scores.policy_chosen_logps, scores.policy_rejected_logps)
    return smoothed_logistic(config.beta * (chosen - rejected - config.gamma_beta_ratio), config.label_smoothing)


@loss(reference=False, per_token=True, likelihood=True)
def orpo(scores: PairScores, config: LossConfig) -> Tensor:
    """`sft - beta log s(log odds(chosen) - log odds(rejected))`. ORPO, arXiv 2403.07691, eq. 6 and 7.

    The odds of a response are P / (1 - P) for `P = exp(log-prob per token)`; beta is the paper's lambda, as in TRL's
    ORPOConfig. The likelihood term counts response tokens, as in the paper; TRL's counts the prompt's too.
    """
    chosen, rejected = per_token(scores, scores.policy_chosen_logps, scores.policy_rejected_logps)
    return sft(scores, config) - config.beta * F.logsigmoid(log_odds(chosen) - log_odds(rejected))


@loss(reference=False, smoothed=True, likelihood=True, reads=("cpo_alpha",))
def cpo(scores: PairScores, config: LossConfig) -> Tensor:
    """`-log s(beta (log-prob of chosen - of rejected)) + cpo_alpha * sft`. CPO, arXiv 2401.08417.

    `label_smoothing` as in `sigmoid`; the likelihood term is a mean over tokens, as in TRL's CPOTrainer.
    """
    logits = config.beta * (scores.policy_chosen_logps - scores.policy_rejected_logps)
    return smoothed_logistic(logits, config.label_smoothing) + config.cpo_alpha * sft(scores, config)


def log_odds(logps: Tensor) -> Tensor:
    """`log(P / (1 - P))` from `log P <= 0`, with the numerically stable form on each side of P = 1/2; P = 1 is treated
    as the largest number below 1.
    """
    logps = logps.clamp(max=-torch.finfo(logps.dtype).eps)
    is_likely = logps > -math.log(2)
    log_rest_likely = torch.log(-torch.expm1(logps.where(is_likely, -1.0)))
    log_rest_unlikely = torch.log1p(-torch.exp(logps.where(~is_likely, -1.0)))
    return logps - log_rest_likely.where(is_likely, log_rest_unlikely)
