"""`LinearKTOLoss`: KTO straight from hidden states, with the call of Liger's fused KTO loss.

In: hidden states, targets and a label of each of B single responses, and a reference as hidden states or as log-probs.
Out: the loss and sums for logging. Refuses labels that are not booleans.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdpo.integrations.linear_losses.base import (
    LinearLoss,
    check_head_width,
    check_matches,
    checked_reference,
    mean_logits,
)
from fastdpo.integrations.linear_losses.rows import Rows, places_of
from fastdpo.losses.checks import check_beta
from fastdpo.ops.targets import labels_of


class LinearKTOLoss(LinearLoss):
    """Mean over B responses of `1 - s(beta (r - kl))` for a wanted one and `1 - s(beta (kl - r))` for an unwanted one.

    r is the response's log-ratio to the reference. KTO, arXiv 2402.01306, with both lambdas 1. A drop-in
    replacement for `liger_kernel.chunked_loss.LigerFusedLinearKTOLoss` (0.8.5). Differences: a kl for each response
    belongs to that response (Liger compares each response with the whole (B,) tensor, and adds up all B * B losses),
    and a sequence without targets counts 0 (nan in Liger if average_log_prob is set).

    Args:
        ignore_index, compiled, chunk_size, use_ref_model, average_log_prob, **same: as in `LinearDPOLoss`.
        beta: temperature of the implicit reward, > 0.
    Raises:
        ValueError: an invalid setting.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compiled: bool = True,
        use_ref_model: bool = False,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        **same: Any,
    ) -> None:
        super().__init__(
            ignore_index=ignore_index,
            beta=beta,
            compiled=compiled,
            average_log_prob=average_log_prob,
            chunk_size=chunk_size,
            **same,
        )
        self.use_ref_model = use_ref_model
        check_beta(beta)

    def forward(
        self,
        hidden: Tensor,
        lm_head_weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        preference_labels: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        kl: Tensor | None = None,
        *,
        ref_logps: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss of a batch of single responses. Unlike the losses of pairs, it takes the hidden states first.

        Args:
            hidden: (B, L, H); already shifted, position l predicts target[:, l].
            lm_head_weight: (V, H).
            target: (B, L) integers in [0, V) or ignore_index.
            bias: (V,), the head's bias.
            preference_labels: (B,) bool, True for wanted responses; required.
            ref_input, ref_weight, ref_bias: the reference's (B, L, H'), (V, H') and (V,); they get no gradient.
            kl: the estimate of the KL divergence from the reference, in nats: a scalar, (1,), or (B,) with one value
                per response; 0 by default. It gets no gradient.
            ref_logps: (B,) known reference log-probs in nats, instead of ref_input, ref_weight and ref_bias: summed
                over the response, or averaged if average_log_prob is set.
        Returns:
            loss, a scalar, differentiable once in hidden, lm_head_weight and bias; and a tuple of sums without
            gradients, each over the wanted and then over the unwanted responses: log-probs, logits (over every
            position, ignored ones too, and the vocabulary), rewards. All fp32 (fp64 for fp64 inputs).
        Raises:
            ValueError: shapes do not match, the reference is missing, incomplete or superfluous, or the inputs are
                invalid for `sequence_logps`.
        """
        wanted = _checked_labels(preference_labels, target)
        check_matches("hidden", hidden, target)
        check_head_width(lm_head_weight, hidden)
        states = {"ref_input": ref_input, "ref_weight": ref_weight, "ref_bias": ref_bias}
        reference = checked_reference(self.use_ref_model, target, states, {"ref_logps": ref_logps}, "response")
        labels = labels_of(target, self.ignore_index)
        rows = Rows.of(labels[:, None], places_of(labels)[:, None])
        num_responses = len(target)
        baseline = self._reference_logps(reference, rows, hidden)
        thresholds = _checked_kl(kl, target)
        signs = torch.where(wanted, 1.0, -1.0)

        def share_of_loss(sums: Tensor, lengths: Tensor, sequences: slice, groups: slice | None = None) -> Tensor:
            gains = self._logps(sums, lengths) - (baseline + thresholds)[sequences].to(sums.dtype)
            return torch.sigmoid(-self.beta * gains * signs[sequences].to(sums.dtype)).sum() / num_responses

        loss, found = self._loss(rows, hidden, lm_head_weight, bias, share_of_loss)
        with torch.no_grad():
            logps = self._logps(found.sums.detach(), found.lengths)
            sums_of_rows = hidden.sum(1, dtype=logps.dtype)  # (B, H)
            halves = (wanted, ~wanted)
            counts = torch.stack(halves).sum(1) * target.shape[1]  # (2,) positions
            totals = torch.stack([sums_of_rows.where(half[:, None], 0.0).sum(0) for half in halves])  # (2, H)
            logits = mean_logits(lm_head_weight, totals / counts.clamp(min=1)[:, None], bias)
            rewards = self.beta * (logps - baseline.to(logps.dtype))
            logged = (
                *_by_label(logps, halves),
                *(logits * counts * lm_head_weight.shape[0]),
                *_by_label(rewards, halves),
            )
        return loss, logged


def _by_label(values: Tensor, halves: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    return tuple(values.where(half, 0.0).sum() for half in halves)


def _checked_labels(preference_labels: Tensor | None, target: Tensor) -> Tensor:
    if target.dim() != 2 or target.shape[0] == 0:
        raise ValueError(f"target must have shape (B, L) with B >= 1, got {tuple(target.shape)}")
    if preference_labels is None:
        raise ValueError("preference_labels must say which responses are wanted, got None")
    if tuple(preference_labels.shape) != target.shape[:1] or preference_labels.dtype != torch.bool:
        raise ValueError(
            f"preference_labels must be booleans of shape ({target.shape[0]},), one per sequence of target, got"
            f" {preference_labels.dtype} of shape {tuple(preference_labels.shape)}"
        )
    return preference_labels


def _checked_kl(kl: Tensor | None, target: Tensor) -> Tensor:
    """(B,), (1,) or ()."""
    if kl is None:
        return torch.zeros((), device=target.device)
    if kl.dim() > 1 or kl.numel() not in (1, target.shape[0]):
        raise ValueError(f"kl must be a scalar or have shape ({target.shape[0]},), got {tuple(kl.shape)}")
    return kl.detach()
