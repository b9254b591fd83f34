"""`LinearDPOLoss`: a preference loss straight from hidden states, with the call signature of Liger's fused DPO loss.

In: the LM head, hidden states and targets of B chosen sequences followed by their B rejected ones, and a reference as
hidden states or as log-probs. Out: the loss and values for logging. Refuses batches that are not pairs, and a reference
that is missing, incomplete, given twice, or given although unused.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdpo.losses import LOSSES, check_loss_settings
from fastdpo.ops import sequence_logps
from fastdpo.ops.sequence_loss import GroupEnd, sequence_loss
from fastdpo.ops.targets import labels_of
from fastdpo.ops.validation import check_settings
from fastdpo.types import IGNORE_INDEX, PairScores

# sums over pairs that read only log-probs and lengths, and only settings of this module
LINEAR_DPO_LOSSES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero", "apo_down"),
    "discopop",
)


class LinearDPOLoss(nn.Module):
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
        skip_tolerance, workspace_bytes, impl: as in `linear_logps`; without skipping, one backward must compute all
            gradients if the inputs are fp32.
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
        *,
        skip_tolerance: float = 0.0,
        workspace_bytes: int | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        self.ignore_index, self.use_ref_model, self.average_log_prob = ignore_index, use_ref_model, average_log_prob
        self.compute_nll_loss, self.alpha = compute_nll_loss, alpha
        self.compiled, self.chunk_size = compiled, chunk_size
        self.loss_type, self.beta = loss_type, beta
        self.label_smoothing, self.discopop_tau = label_smoothing, discopop_tau
        self.skip_tolerance, self.workspace_bytes, self.impl = skip_tolerance, workspace_bytes, impl
        check_loss_settings(loss_type, self)
        if loss_type not in LINEAR_DPO_LOSSES:
            raise ValueError(
                f"loss_type must be one of {sorted(LINEAR_DPO_LOSSES)}, got {loss_type!r}: DPOTrainer has all losses"
            )
        check_settings(1.0, None, (), skip_tolerance, workspace_bytes, impl)
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
        _check_pairs(lm_head_weight, hidden, target)
        ref_logps = self._given_reference(target, ref_input, ref_weight, ref_bias, ref_chosen_logps, ref_rejected_logps)
        rows = _Rows.of(labels_of(target, self.ignore_index))
        if ref_input is not None and ref_weight is not None:
            with torch.no_grad():
                reference = sequence_logps(
                    rows.take(ref_input), ref_weight, rows.labels, rows.cu_seqlens, bias=ref_bias, impl=self.impl
                )
            ref_logps = self._logps(reference.sums, reference.lengths)
        if ref_logps is None:
            ref_logps = hidden.new_zeros(len(target), dtype=torch.promote_types(hidden.dtype, torch.float32))

        num_pairs, num_chosen_tokens = len(target) // 2, rows.num_chosen_tokens.clamp(min=1)

        def share_of_loss(sums: Tensor, lengths: Tensor, sequences: slice, groups: slice | None = None) -> Tensor:
            scores = self._scores(sums, lengths, ref_logps[sequences])
            share = LOSSES[self.loss_type](scores, self).sum() / num_pairs
            if self.compute_nll_loss:
                share = share - self.alpha * sums[0::2].sum() / num_chosen_tokens
            return share

        args = (rows.take(hidden), lm_head_weight, rows.labels, rows.cu_seqlens)
        settings: dict[str, Any] = {"bias": bias, "workspace_bytes": self.workspace_bytes, "impl": self.impl}
        if self.skip_tolerance == 0 and self.impl != "reference":
            loss, found = sequence_loss(*args, rows.pair_ends, share_of_loss, **settings)
        else:
            found = sequence_logps(*args, skip_tolerance=self.skip_tolerance, **settings)
            loss = share_of_loss(found.sums, found.lengths, slice(None))

        with torch.no_grad():
            scores = self._scores(found.sums.detach(), found.lengths, ref_logps)
            nll_loss = -found.sums[0::2].sum() / num_chosen_tokens if self.compute_nll_loss else loss.new_zeros(())
            logged = (
                scores.policy_chosen_logps,
                scores.policy_rejected_logps,
                *_mean_logits(lm_head_weight, hidden, bias, found.sums.dtype),
                nll_loss.detach(),
                self.beta * scores.chosen_logratios,
                self.beta * scores.rejected_logratios,
            )
        return loss, logged

    def _logps(self, sums: Tensor, lengths: Tensor) -> Tensor:
        return sums / lengths.clamp(min=1) if self.average_log_prob else sums

    def _scores(self, sums: Tensor, lengths: Tensor, ref_logps: Tensor) -> PairScores:
        """PairScores from (2b,) numbers of the sequences of b pairs, each chosen one followed by its rejected one."""
        ref_logps = ref_logps.to(sums.dtype)
        both = (self._logps(sums, lengths), ref_logps, lengths)
        return PairScores(*(x[half::2] for x in both for half in (0, 1)))

    def _given_reference(
        self,
        target: Tensor,
        ref_input: Tensor | None,
        ref_weight: Tensor | None,
        ref_bias: Tensor | None,
        ref_chosen_logps: Tensor | None,
        ref_rejected_logps: Tensor | None,
    ) -> Tensor | None:
        """(2B,) known reference log-probs, pair by pair; None if they must be computed.

        Refuses everything but exactly one complete reference, or none if use_ref_model is False.
        """
        states = {"ref_input": ref_input, "ref_weight": ref_weight, "ref_bias": ref_bias}
        logps = {"ref_chosen_logps": ref_chosen_logps, "ref_rejected_logps": ref_rejected_logps}
        given = [name for name, x in {**states, **logps}.items() if x is not None]
        if not self.use_ref_model:
            if given:
                raise ValueError(f"{given[0]} must be None if use_ref_model is False, got a value")
            return None
        from_states, from_logps = [[name for name in given if name in group] for group in (states, logps)]
        if from_states and from_logps:
            raise ValueError(f"{from_logps[0]} must be None if {from_states[0]} is given, got both: pass one reference")
        if not given:
            raise ValueError(
                "ref_input and ref_weight, or ref_chosen_logps and ref_rejected_logps, must be given if use_ref_model"
                " is True, got neither"
            )
        if from_states:
            missing = [name for name in ("ref_input", "ref_weight") if states[name] is None]
            if missing:
                raise ValueError(f"{missing[0]} must be given with {from_states[0]}, got None")
            if ref_input is not None and (ref_input.dim() != 3 or ref_input.shape[:2] != target.shape):
                expected = f"({target.shape[0]}, {target.shape[1]}, H)"
                raise ValueError(f"ref_input must have shape {expected} to match target, got {tuple(ref_input.shape)}")
            return None
        if ref_chosen_logps is None or ref_rejected_logps is None:
            raise ValueError("ref_chosen_logps and ref_rejected_logps must be given together, got only one of them")
        num_pairs = target.shape[0] // 2
        for name, x in (("ref_chosen_logps", ref_chosen_logps), ("ref_rejected_logps", ref_rejected_logps)):
            if tuple(x.shape) != (num_pairs,) or x.device != target.device:
                raise ValueError(
                    f"{name} must have one value per pair, shape ({num_pairs},) on {target.device},"
                    f" got {tuple(x.shape)} on {x.device}"
                )
        return torch.stack([ref_chosen_logps, ref_rejected_logps], 1).flatten().detach()


class _Rows(NamedTuple):
    """The positions of a (2B, L) batch that reach the LM head, each chosen sequence followed by its rejected one."""

    labels: Tensor  # (T,)
    cu_seqlens: Tensor  # (2B + 1,)
    pair_ends: list[GroupEnd]
    num_chosen_tokens: Tensor  # ()
    positions: Tensor | None  # (T,) of the rows in the flat (2B * L,) batch; None takes every position

    @classmethod
    def of(cls, labels: Tensor) -> _Rows:
        """The positions whose label is not IGNORE_INDEX. Counting them synchronizes with the GPU once per call.

        Under torch.compile all positions are rows, so that shapes do not depend on values.
        """
        num_pairs, length = len(labels) // 2, labels.shape[1]
        labels = labels.unflatten(0, (2, num_pairs)).transpose(0, 1)  # (B, 2, L)
        keep = labels != IGNORE_INDEX
        num_chosen_tokens = keep[:, 0].sum()
        if not torch.compiler.is_compiling():
            kept = keep.flatten().nonzero()[:, 0]
            if kept.shape[0] < labels.numel():
                cu_seqlens = F.pad(keep.sum(2).flatten().cumsum(0), (1, 0))
                ends = [GroupEnd(end, end, 2 * (i + 1)) for i, end in enumerate(cu_seqlens[2::2].tolist())]
                place = torch.arange(labels.numel(), device=labels.device).view(2, num_pairs, length).transpose(0, 1)
                return cls(labels.flatten()[kept], cu_seqlens, ends, num_chosen_tokens, place.flatten()[kept])
        cu_seqlens = torch.arange(2 * num_pairs + 1, device=labels.device) * length
        ends = [GroupEnd(2 * i * length, 2 * i * length, 2 * i) for i in range(1, num_pairs + 1)]
        return cls(labels.flatten(), cu_seqlens, ends, num_chosen_tokens, None)

    def take(self, hidden: Tensor) -> Tensor:
        """(T, H) rows of (2B, L, H) hidden states."""
        if self.positions is not None:
            return hidden.flatten(0, 1).index_select(0, self.positions)
        return hidden.unflatten(0, (2, len(hidden) // 2)).transpose(0, 1).flatten(0, 2)


def _mean_logits(weight: Tensor, hidden: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean logit of the chosen and the rejected half, from the mean row, because the head is linear."""
    with torch.autocast(weight.device.type, enabled=False):
        means = torch.stack([half.mean((0, 1), dtype=dtype) for half in hidden.chunk(2)])  # (2, H)
        logits = F.linear(means.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))  # (2, V)
        chosen, rejected = logits.mean(-1, dtype=dtype)
    return chosen, rejected


def _check_pairs(lm_head_weight: Tensor, hidden: Tensor, target: Tensor) -> None:
    if target.dim() != 2 or target.shape[0] == 0 or target.shape[0] % 2:
        raise ValueError(
            "target must have shape (2B, L), the B >= 1 chosen sequences first and then the rejected ones,"
            f" got {tuple(target.shape)}"
        )
    if hidden.dim() != 3 or hidden.shape[:2] != target.shape:
        expected = f"({target.shape[0]}, {target.shape[1]}, H)"
        raise ValueError(f"hidden must have shape {expected} to match target, got {tuple(hidden.shape)}")
    if lm_head_weight.dim() != 2 or lm_head_weight.shape[1] != hidden.shape[2]:
        raise ValueError(
            f"lm_head_weight must have shape (V, {hidden.shape[2]}) to match hidden, got {tuple(lm_head_weight.shape)}"
        )
