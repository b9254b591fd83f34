"""The losses of pairs straight from hidden states: the call that DPO, CPO, ORPO and SimPO share.

In: the LM head, hidden states and targets of B chosen sequences followed by their B rejected ones. Out: the loss and
values for logging. Refuses batches that are not pairs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdpo.integrations.linear_losses.base import (
    LinearLoss,
    Reference,
    check_head_width,
    check_matches,
    mean_logits,
)
from fastdpo.integrations.linear_losses.rows import Rows, places_of
from fastdpo.losses.checks import check_at_least_0, check_loss_settings
from fastdpo.ops.targets import labels_of
from fastdpo.types import IGNORE_INDEX, PairScores


class LinearPairLoss(LinearLoss):
    """A mean over pairs of `_pair_losses`, and alpha times the mean NLL per chosen token if compute_nll_loss is set."""

    def __init__(
        self,
        loss_type: str,
        *,
        compute_nll_loss: bool,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self.loss_type, self.compute_nll_loss, self.alpha = loss_type, compute_nll_loss, alpha
        self.label_smoothing, self.discopop_tau = label_smoothing, discopop_tau
        check_loss_settings(loss_type, self)
        check_at_least_0("alpha", alpha)

    def _pair_losses(self, scores: PairScores) -> Tensor:
        """(B,) losses; the log-probs of `scores` are means per token if average_log_prob is set."""
        raise NotImplementedError

    def _of_pairs(
        self,
        lm_head_weight: Tensor,
        hidden: Tensor,
        target: Tensor,
        bias: Tensor | None,
        reference: Reference,
        nll_target: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss, and the seven values that every loss of pairs returns (see `LinearDPOLoss.forward`)."""
        labels, positions = _by_pair(labels_of(target, self.ignore_index))
        nll_labels, nll = labels[:, :1], 0
        if nll_target is not None:
            nll_labels, nll = _by_pair(labels_of(nll_target, self.ignore_index))[0][:, :1], 2
            labels, positions = torch.cat([labels, nll_labels], 1), torch.cat([positions, positions[:, :1]], 1)
        rows = Rows.of(labels, positions)
        num_pairs, width = labels.shape[:2]
        num_nll_tokens = (nll_labels != IGNORE_INDEX).sum().clamp(min=1)
        ref_logps = self._reference_logps(reference, rows, hidden)

        def scores_of(sums: Tensor, lengths: Tensor, ref_logps: Tensor) -> PairScores:
            both = (self._logps(sums, lengths), ref_logps.to(sums.dtype), lengths)
            return PairScores(*(x[half::width] for x in both for half in (0, 1)))

        def share_of_loss(sums: Tensor, lengths: Tensor, sequences: slice, groups: slice | None = None) -> Tensor:
            share = self._pair_losses(scores_of(sums, lengths, ref_logps[sequences])).sum() / num_pairs
            if self.compute_nll_loss:
                share = share - self.alpha * sums[nll::width].sum() / num_nll_tokens
            return share

        loss, found = self._loss(rows, hidden, lm_head_weight, bias, share_of_loss)
        with torch.no_grad():
            sums = found.sums.detach()
            scores = scores_of(sums, found.lengths, ref_logps)
            nll_loss = -sums[nll::width].sum() / num_nll_tokens if self.compute_nll_loss else sums.new_zeros(())
            means = torch.stack([half.mean((0, 1), dtype=sums.dtype) for half in hidden.chunk(2)])  # (2, H)
            logged = (
                scores.policy_chosen_logps,
                scores.policy_rejected_logps,
                *mean_logits(lm_head_weight, means, bias),
                nll_loss,
                self.beta * scores.chosen_logratios,
                self.beta * scores.rejected_logratios,
            )
        return loss, logged


def check_pairs(lm_head_weight: Tensor, hidden: Tensor, target: Tensor) -> None:
    if target.dim() != 2 or target.shape[0] == 0 or target.shape[0] % 2:
        raise ValueError(
            "target must have shape (2B, L), the B >= 1 chosen sequences first and then the rejected ones,"
            f" got {tuple(target.shape)}"
        )
    check_matches("hidden", hidden, target)
    check_head_width(lm_head_weight, hidden)


def _by_pair(labels: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 2, L) labels of (2B, L), each chosen sequence beside its rejected one, and their places in the batch."""
    by_pair = [x.unflatten(0, (2, len(x) // 2)).transpose(0, 1) for x in (labels, places_of(labels))]
    return by_pair[0], by_pair[1]
