"""`LinearCPOLoss`, `LinearSimPOLoss` and `LinearORPOLoss`: losses of pairs without a reference, straight from hidden
states, with the calls of Liger's fused losses.

In: a batch of pairs. Out: the loss and values for logging. Refuses an nll_target that would not be used.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fastdpo.integrations.linear_losses.base import Reference
from fastdpo.integrations.linear_losses.pairs import LinearPairLoss, check_pairs
from fastdpo.losses.checks import check_at_least_0
from fastdpo.losses.likelihood import log_odds
from fastdpo.losses.pairwise import smoothed_logistic
from fastdpo.types import PairScores


class LinearCPOLoss(LinearPairLoss):
    """`-log s(beta (log-prob of chosen - of rejected)) + alpha * NLL`. CPO, arXiv 2401.08417.

    A drop-in replacement for `liger_kernel.chunked_loss.LigerFusedLinearCPOLoss` (0.8.5). A sequence without targets
    counts 0 (nan in Liger if average_log_prob is set).

    Args:
        ignore_index, beta, compute_nll_loss, compiled, average_log_prob, chunk_size, **same: as in `LinearDPOLoss`.
        alpha: weight of the mean NLL per chosen token; no effect if compute_nll_loss is False.
        label_smoothing: probability of a flipped label, in [0, 0.5).
    Raises:
        ValueError: an invalid setting.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        **same: Any,
    ) -> None:
        super().__init__(
            "cpo",
            ignore_index=ignore_index,
            beta=beta,
            alpha=alpha,
            label_smoothing=label_smoothing,
            compute_nll_loss=compute_nll_loss,
            compiled=compiled,
            average_log_prob=average_log_prob,
            chunk_size=chunk_size,
            **same,
        )

    def forward(
        self, lm_head_weight: Tensor, hidden: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss of a batch of pairs; arguments, results and errors as in `LinearDPOLoss.forward`.

        The rewards are beta times the log-probs.
        """
        check_pairs(lm_head_weight, hidden, target)
        return self._of_pairs(lm_head_weight, hidden, target, bias, Reference())

    def _pair_losses(self, scores: PairScores) -> Tensor:
        return smoothed_logistic(self.beta * scores.margins, self.label_smoothing)


class LinearSimPOLoss(LinearPairLoss):
    """`-log s(beta (p - q) - gamma)`, p and q the log-probs per token. SimPO, arXiv 2405.14734, eq. 6.

    A drop-in replacement for `liger_kernel.chunked_loss.LigerFusedLinearSimPOLoss` (0.8.5), which adds the NLL by
    default. gamma is the paper's, `gamma_beta_ratio` of `fastdpo.LOSSES` times beta. A sequence without targets counts
    0 (nan in Liger).

    Args:
        ignore_index, beta, compiled, chunk_size, **same: as in `LinearDPOLoss`.
        alpha: weight of the mean NLL per chosen token; no effect if compute_nll_loss is False.
        label_smoothing: probability of a flipped label, in [0, 0.5).
        compute_nll_loss: add alpha times the mean NLL per chosen token to the loss, in nats.
        gamma: the margin that is asked for, in units of the reward, >= 0.
    Raises:
        ValueError: an invalid setting.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        gamma: float = 0.5,
        chunk_size: int = 1,
        **same: Any,
    ) -> None:
        super().__init__(
            "simpo",
            ignore_index=ignore_index,
            beta=beta,
            alpha=alpha,
            label_smoothing=label_smoothing,
            compute_nll_loss=compute_nll_loss,
            compiled=compiled,
            average_log_prob=True,
            chunk_size=chunk_size,
            **same,
        )
        self.gamma = gamma
        check_at_least_0("gamma", gamma)

    def forward(
        self, lm_head_weight: Tensor, hidden: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss of a batch of pairs; arguments, results and errors as in `LinearDPOLoss.forward`.

        The log-probs are means per token, and the rewards are beta times these.
        """
        check_pairs(lm_head_weight, hidden, target)
        return self._of_pairs(lm_head_weight, hidden, target, bias, Reference())

    def _pair_losses(self, scores: PairScores) -> Tensor:
        return smoothed_logistic(self.beta * scores.margins - self.gamma, self.label_smoothing)


class LinearORPOLoss(LinearPairLoss):
    """`NLL - beta log s(log odds(chosen) - log odds(rejected))`. ORPO, arXiv 2403.07691, eq. 6 and 7.

    The odds of a response are P / (1 - P) for `P = exp(log-prob per token)`; beta is the paper's lambda. A drop-in
    replacement for `liger_kernel.chunked_loss.LigerFusedLinearORPOLoss` (0.8.5). A response whose P rounds to 1 and
    a sequence without targets, which counts as P = 1, give finite odds (inf and nan in Liger).

    Args:
        ignore_index, beta, compiled, chunk_size, **same: as in `LinearDPOLoss`.
        compute_nll_loss: add the mean NLL per chosen token to the loss, in nats.
    Raises:
        ValueError: an invalid setting.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        chunk_size: int = 1,
        **same: Any,
    ) -> None:
        super().__init__(
            "orpo",
            ignore_index=ignore_index,
            beta=beta,
            compute_nll_loss=compute_nll_loss,
            compiled=compiled,
            average_log_prob=True,
            chunk_size=chunk_size,
            **same,
        )

    def forward(
        self,
        lm_head_weight: Tensor,
        hidden: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        nll_target: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss of a batch of pairs; other arguments and errors as in `LinearDPOLoss.forward`.

        Args:
            nll_target: (2B, L) targets of the NLL in place of `target`, for example the prompt's tokens too; only the
                chosen half is read. A position with the same target in both goes through the head once.
        Returns:
            loss and a tuple: the values of `LinearDPOLoss.forward` (log-probs are means per token, rewards beta times
            these), then the means over pairs of log s(difference of log odds) and of the difference, scalars.
        """
        check_pairs(lm_head_weight, hidden, target)
        if nll_target is not None and not self.compute_nll_loss:
            raise ValueError("nll_target must be None if compute_nll_loss is False, got a value")
        if nll_target is not None and nll_target.shape != target.shape:
            raise ValueError(f"nll_target must have shape {tuple(target.shape)}, got {tuple(nll_target.shape)}")
        loss, logged = self._of_pairs(lm_head_weight, hidden, target, bias, Reference(), nll_target)
        ratios = log_odds(logged[0]) - log_odds(logged[1])
        return loss, (*logged, F.logsigmoid(ratios).mean(), ratios.mean())

    def _pair_losses(self, scores: PairScores) -> Tensor:
        ratios = log_odds(scores.policy_chosen_logps) - log_odds(scores.policy_rejected_logps)
        return -self.beta * F.logsigmoid(ratios)
