"""Losses of several pairs together: PairScores in, one loss per rank of a batch or per stage of a ranking out.

AOT (arXiv 2406.05882) compares distributions: on sorted samples, stochastic dominance is a comparison rank by rank,
here with the logistic loss. The i-th returned number belongs to rank i and not to a pair, so a batch cannot be split,
and the same pairs in other batches give another loss.

A ranking of K responses, best first, is given as its K - 1 neighbouring pairs in order: stage k chooses response k
among the remaining ones. `PairScores.rankings` gives the ranking of each pair. Rankings are independent of each other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdpo.losses.pairwise import smoothed_logistic
from fastdpo.losses.registry import loss
from fastdpo.losses.settings import LossConfig
from fastdpo.types import PairScores


@loss(unit="batch", smoothed=True)
def aot(scores: PairScores, config: LossConfig) -> Tensor:
    """Paired AOT, arXiv 2406.05882: the policy's chosen-rejected margins should dominate the reference's, rank by rank.

    `-log s(beta (u_(i) - v_(i)))` for the sorted `u = log policy(chosen) / policy(rejected)` and v alike of the
    reference.
    """
    policy = (scores.policy_chosen_logps - scores.policy_rejected_logps).sort().values
    reference = (scores.ref_chosen_logps - scores.ref_rejected_logps).sort().values
    return smoothed_logistic(config.beta * (policy - reference), config.label_smoothing)


@loss(unit="batch", smoothed=True)
def aot_unpaired(scores: PairScores, config: LossConfig) -> Tensor:
    """Unpaired AOT, arXiv 2406.05882: the log-ratios of chosen responses should dominate those of rejected ones.

    `-log s(beta (c_(i) - r_(i)))` for sorted log-ratios; which response was compared with which does not matter.
    """
    chosen, rejected = scores.chosen_logratios.sort().values, scores.rejected_logratios.sort().values
    return smoothed_logistic(config.beta * (chosen - rejected), config.label_smoothing)


@loss(unit="ranking", divergence=True)
def plackett_luce(scores: PairScores, config: LossConfig) -> Tensor:
    """Negative log-likelihood of a ranking, as the sum of its stages. DPO, arXiv 2305.18290, appendix A.3.

    With rewards `w_k = beta * log-ratio` of the responses in order, stage k is `log sum_{j >= k} exp(w_j) - w_k`; the
    sum over a ranking's stages is its loss, and for K = 2 that is `sigmoid`.
    """
    chosen, rejected = config.beta * scores.chosen_logratios, config.beta * scores.rejected_logratios
    num_pairs = len(chosen)
    place = torch.arange(num_pairs, device=chosen.device)
    rankings = place if scores.rankings is None else scores.rankings
    is_left = (rankings[:, None] == rankings) & (place >= place[:, None])  # (B, B): j is below stage i in its ranking
    left = rejected.expand(num_pairs, num_pairs).masked_fill(~is_left, -torch.inf).logsumexp(1)
    return torch.logaddexp(chosen, left) - chosen
