"""`LinearDPOLoss`: DPO and its relatives straight from hidden states, with the call of Liger's fused DPO loss.

In: a batch of pairs, and a reference as hidden states or as log-probs. Out: the loss and values for logging. Refuses
losses that need more than log-probs and lengths.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastdpo.integrations.linear_losses.base import checked_reference
from fastdpo.integrations.linear_losses.pairs import LinearPairLoss, check_pairs
from fastdpo.losses import LOSSES
from fastdpo.types import PairScores

# sums over pairs that read only log-probs and lengths, and only settings of this module
LINEAR_DPO_LOSSES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero", "apo_down"),
    "discopop",
)


class LinearDPOLoss(LinearPairLoss):
    """Mean preference loss of B pairs, from the hidden states before the LM head. The logits are never materialized.

    A drop-in replacement for `liger_kernel.chunked_loss.LigerFusedLinearDPOLoss` (0.8.5). Differences: "ipo" works
    (log-ratios averaged per token, as in TRL), label_smoothing applies to "sigmoid" (conservative DPO) and is refused
    for losses that ignore it, and a sequence without targets counts 0 (nan in Liger). Both skip dW of a frozen
    head. The gradient is computed in forward from the same logits (`fastdpo.ops.sequence_loss`), unless skip_tolerance
    allows skipping tiles.

    Args:
        ignore_index: target of ignored positions; they never reach the head.
        beta: temperature of the implicit reward, > 0.
        alpha: weight of the NLL of the chosen responses if compute_nll_loss is set.
        compute_nll_loss: add alpha times the mean NLL per chosen token to the loss, in nats.
        compiled, chunk_size: accepted without effect; there is nothing to compile, and the op chooses its tiles.
        use_ref_model: compare with a reference; False sets the reference log-probs to 0.
        average_log_prob: mean instead of sum over the tokens of a response, in the loss and in the returned log-probs.
        loss_type: one of LINEAR_DPO_LOSSES; the other `fastdpo.LOSSES` need values that only a trainer has.
        label_smoothing: probability of a flipped label, for "sigmoid", "robust" and "exo_pair".
        discopop_tau: temperature of "discopop".
        **same: skip_tolerance, workspace_bytes and impl, as in `linear_logps`; without skipping, one backward must
            compute all gradients if the inputs are fp32.
    Raises:
        ValueError: an invalid setting.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
        **same: Any,
    ) -> None:
        super().__init__(
            loss_type,
            ignore_index=ignore_index,
            beta=beta,
            alpha=alpha,
            compute_nll_loss=compute_nll_loss,
            compiled=compiled,
            average_log_prob=average_log_prob,
            chunk_size=chunk_size,
            label_smoothing=label_smoothing,
            discopop_tau=discopop_tau,
            **same,
        )
        self.use_ref_model = use_ref_model
        if loss_type not in LINEAR_DPO_LOSSES:
            raise ValueError(
                f"loss_type must be one of {sorted(LINEAR_DPO_LOSSES)}, got {loss_type!r}: DPOTrainer has all losses"
            )
        if loss_type == "ipo" and average_log_prob:
            raise ValueError(
                "average_log_prob must be False for loss_type 'ipo', which already averages per token, got True"
            )

    def forward(
        self,
        lm_head_weight: Tensor,
        hidden: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        *,
        ref_chosen_logps: Tensor | None = None,
        ref_rejected_logps: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss of a batch of pairs.

        Args:
            lm_head_weight: (V, H).
            hidden: (2B, L, H), the chosen sequences first; already shifted, position l predicts target[:, l].
            target: (2B, L) integers in [0, V) or ignore_index.
            bias: (V,), the head's bias.
            ref_input, ref_weight, ref_bias: the reference's (2B, L, H'), (V, H') and (V,); they get no gradient.
            ref_chosen_logps, ref_rejected_logps: (B,) known reference log-probs in nats, instead of the three above:
                summed over the response, or averaged if average_log_prob is set.
        Returns:
            loss, a scalar, differentiable once in lm_head_weight, hidden and bias; and a tuple without gradients:
            chosen_logps (B,), rejected_logps (B,), chosen_logits_mean, rejected_logits_mean (scalars, over every
            position, ignored ones too, and the vocabulary), nll_loss (scalar, 0 unless compute_nll_loss),
            chosen_rewards (B,), rejected_rewards (B,). All fp32 (fp64 for fp64 inputs).
        Raises:
            ValueError: shapes do not match, the reference is missing, incomplete or superfluous, or the inputs are
                invalid for `sequence_logps`.
        """
        check_pairs(lm_head_weight, hidden, target)
        reference = checked_reference(
            self.use_ref_model,
            target,
            {"ref_input": ref_input, "ref_weight": ref_weight, "ref_bias": ref_bias},
            {"ref_chosen_logps": ref_chosen_logps, "ref_rejected_logps": ref_rejected_logps},
            "pair",
        )
        return self._of_pairs(lm_head_weight, hidden, target, bias, reference)

    def _pair_losses(self, scores: PairScores) -> Tensor:
        return LOSSES[self.loss_type](scores, self)
