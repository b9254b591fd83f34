"""From summed log-probs of sequences to PairScores, and from PairScores to the weighted sum of a run's losses.

Two settings are applied here because they change the inputs of losses and not their formulas: `ld_alpha` (LD-DPO) and
`use_weighting` (WPO).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdpo.losses.divergence import under_divergence
from fastdpo.losses.registry import LOSSES
from fastdpo.losses.settings import LossConfig
from fastdpo.types import PairScores


def pair_scores(
    pairs: Tensor,
    sums: Tensor,
    lengths: Tensor,
    ref_sums: Tensor,
    config: LossConfig,
    *,
    shared_parts: Tensor | None = None,
    rankings: Tensor | None = None,
    mean_chosen_length: Tensor | None = None,
    log_sum_sq_probs: Tensor | None = None,
) -> PairScores:
    """The inputs of the losses in `config`, for the given pairs.

    Args:
        pairs: (B, 2) int64, the sequences of chosen and rejected.
        sums, lengths, ref_sums: (S,) summed log-probs of the policy and of the reference, nats, and counted tokens.
        shared_parts: (B, 2) int64, the sequences of each pair up to their shared length; needed with `ld_alpha`.
        rankings: (B,) int64, the ranking that each pair is a stage of; read by listwise losses.
        mean_chosen_length: (), tokens per chosen response over the optimizer step, for losses that average over tokens.
        log_sum_sq_probs: (S,) sums over the tokens of each sequence, needed with `use_weighting`.
    """
    chosen, rejected = pairs.unbind(1)
    policy_sums, reference_sums = sums[pairs], ref_sums[pairs]
    if config.ld_alpha is not None:
        assert shared_parts is not None
        policy_sums = _weighed(policy_sums, sums[shared_parts], config.ld_alpha)
        reference_sums = _weighed(reference_sums, ref_sums[shared_parts], config.ld_alpha)
    weights = None
    if config.use_weighting and log_sum_sq_probs is not None:
        likelihoods = relative_likelihoods(sums, log_sum_sq_probs, lengths)
        weights = likelihoods[chosen] * likelihoods[rejected]
    return PairScores(
        policy_chosen_logps=policy_sums[:, 0],
        policy_rejected_logps=policy_sums[:, 1],
        ref_chosen_logps=reference_sums[:, 0],
        ref_rejected_logps=reference_sums[:, 1],
        chosen_lengths=lengths[chosen],
        rejected_lengths=lengths[rejected],
        chosen_sums=None if config.ld_alpha is None else sums[chosen],
        mean_chosen_length=mean_chosen_length,
        pair_weights=weights,
        rankings=rankings,
    )


def _weighed(whole: Tensor, shared: Tensor, ld_alpha: float) -> Tensor:
    """(B, 2) sums in which tokens beyond the shared length weigh `ld_alpha`; LD-DPO, arXiv 2409.06411."""
    return ld_alpha * whole + (1 - ld_alpha) * shared


def relative_likelihoods(sums: Tensor, log_sum_sq_probs: Tensor, lengths: Tensor) -> Tensor:
    """(S,) likelihood of each sequence relative to typical samples of the policy: WPO, arXiv 2406.11827, eq. 2.

    The exponential of the mean over tokens of `log p(token) - log sum_v p(v)^2`; 1 is typical. It has no gradient, so
    that training cannot lower the loss by lowering a pair's weight.
    """
    return torch.exp((sums - log_sum_sq_probs).detach() / lengths.clamp(min=1))


def preference_losses(scores: PairScores, config: LossConfig) -> Tensor:
    """(B,) weighted sum of the losses in `config.loss_type` with `loss_weights`; its mean over the step is the loss."""
    divergent = under_divergence(scores, config)
    total = torch.zeros_like(scores.policy_chosen_logps)
    for name, factor in zip(config.loss_type, config.loss_weights or [1.0] * len(config.loss_type), strict=True):
        loss = LOSSES[name]
        losses = loss(divergent if loss.divergence else scores, config)
        if scores.pair_weights is not None and loss.unit != "token":
            losses = losses * scores.pair_weights
        total = total + factor * losses
    return total


def is_listwise(config: LossConfig) -> bool:
    """Whether the loss is a mean over rankings."""
    return any(LOSSES[name].unit == "ranking" for name in config.loss_type)


def looks_at_whole_batch(config: LossConfig) -> bool:
    """Whether the loss needs the whole batch, so that it is not the sum of the losses of parts."""
    return any(LOSSES[name].unit == "batch" for name in config.loss_type)
