"""`preference_loss`: the loss of the original DPO release (eric-mitchell/direct-preference-optimization), with its
signature. Log-probs in, losses and rewards out.
"""

from __future__ import annotations

from torch import Tensor

from fastdpo.losses.pairwise import smoothed_logistic


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
        beta: temperature of the implicit reward; with `ipo` the regularization tau.
        label_smoothing: probability that a label is flipped (conservative DPO); not used by ipo.
        ipo: squared loss on summed log-probs (arXiv 2310.12036, eq. 17 without the average over tokens).
        reference_free: ignore the reference in the loss; the rewards still use it.
    Returns:
        losses (B,), and detached chosen and rejected rewards `beta * (policy - reference)` (B,).
    """
    policy_logratios = policy_chosen_logps - policy_rejected_logps
    reference_logratios = 0.0 if reference_free else reference_chosen_logps - reference_rejected_logps
    margins = policy_logratios - reference_logratios
    losses = (margins - 1 / (2 * beta)) ** 2 if ipo else smoothed_logistic(beta * margins, label_smoothing)
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps).detach()
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps).detach()
    return losses, chosen_rewards, rejected_rewards
