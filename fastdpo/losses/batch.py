"""Losses that compare distributions over a batch: sorted numbers of all pairs in, one loss per rank out.

The loss of a pair depends on the other pairs of its batch, so a batch cannot be split, and the same pairs in other
batches are another loss. AOT, arXiv 2406.05882: with sorted samples, stochastic dominance of one distribution over
another is a comparison rank by rank, here under the logistic loss. The i-th number returned belongs to rank i and to no
pair.
"""

from __future__ import annotations

from torch import Tensor

from fastdpo.losses.pairwise import smoothed_logistic
from fastdpo.losses.settings import LossConfig
from fastdpo.types import PairScores


def aot(scores: PairScores, config: LossConfig) -> Tensor:
    """Paired AOT, arXiv 2406.05882: the policy's chosen-rejected margins should dominate the reference's, rank by rank.

    `-log s(beta (u_(i) - v_(i)))` for the sorted `u = log policy(chosen) / policy(rejected)` and v alike of the
    reference.
    """
    policy = (scores.policy_chosen_logps - scores.policy_rejected_logps).sort().values
    reference = (scores.ref_chosen_logps - scores.ref_rejected_logps).sort().values
    return smoothed_logistic(config.beta * (policy - reference), config.label_smoothing)


def aot_unpaired(scores: PairScores, config: LossConfig) -> Tensor:
    """Unpaired AOT, arXiv 2406.05882: the log-ratios of chosen responses should dominate those of rejected ones.

    `-log s(beta (c_(i) - r_(i)))` for sorted log-ratios; which response was compared with which does not matter.
    """
    chosen, rejected = scores.chosen_logratios.sort().values, scores.rejected_logratios.sort().values
    return smoothed_logistic(config.beta * (chosen - rejected), config.label_smoothing)
