"""What the losses straight from hidden states share: settings, a reference, the head op, mean logits.

In: hidden states, targets and the reference's. Out: log-probs and a loss without logits. Refuses shapes that do not
match, and a reference that is missing, incomplete, given twice, or given although unused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdpo.integrations.linear_losses.rows import Rows
from fastdpo.ops import sequence_logps
from fastdpo.ops.sequence_loss import sequence_loss
from fastdpo.ops.validation import check_settings
from fastdpo.types import SequenceLogps


@dataclass(frozen=True)
class Reference:
    """Known log-probs, or hidden states and a head; with neither, the reference's log-probs are 0."""

    logps: Tensor | None = None  # (S,)
    hidden: Tensor | None = None  # (S, L, H')
    weight: Tensor | None = None  # (V, H')
    bias: Tensor | None = None  # (V,)


class LinearLoss(nn.Module):
    """The base of `LinearDPOLoss` and its siblings.

    The logits of the batch are never materialized. The gradient is computed in forward from the logits that gave the
    log-probs (`fastdpo.ops.sequence_loss`), unless skip_tolerance allows skipping tiles.

    Args:
        ignore_index: target of ignored positions; they never reach the head.
        beta: factor of the log-probs or log-ratios, > 0.
        average_log_prob: mean instead of sum over the tokens of a response, in the loss and in the returned log-probs.
        compiled, chunk_size: accepted without effect; there is nothing to compile, and the op chooses its tiles.
        skip_tolerance, workspace_bytes, impl: as in `linear_logps`; without skipping, one backward must compute all
            gradients if the inputs are fp32.
    """

    def __init__(
        self,
        *,
        ignore_index: int,
        beta: float,
        average_log_prob: bool,
        compiled: bool,
        chunk_size: int,
        skip_tolerance: float = 0.0,
        workspace_bytes: int | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        self.ignore_index, self.beta, self.average_log_prob = ignore_index, beta, average_log_prob
        self.compiled, self.chunk_size = compiled, chunk_size
        self.skip_tolerance, self.workspace_bytes, self.impl = skip_tolerance, workspace_bytes, impl
        check_settings(1.0, None, (), skip_tolerance, workspace_bytes, impl)

    def _logps(self, sums: Tensor, lengths: Tensor) -> Tensor:
        return sums / lengths.clamp(min=1) if self.average_log_prob else sums

    def _reference_logps(self, reference: Reference, rows: Rows, hidden: Tensor) -> Tensor:
        """(S,) in nats, without gradient."""
        if reference.logps is not None:
            return reference.logps
        if reference.hidden is None or reference.weight is None:
            dtype = torch.promote_types(hidden.dtype, torch.float32)
            return hidden.new_zeros(len(rows.cu_seqlens) - 1, dtype=dtype)
        with torch.no_grad():
            args = (rows.take(reference.hidden), reference.weight, rows.labels, rows.cu_seqlens)
            found = sequence_logps(*args, rows=rows.token_rows, bias=reference.bias, impl=self.impl)
        return self._logps(found.sums, found.lengths)

    def _loss(
        self,
        rows: Rows,
        hidden: Tensor,
        lm_head_weight: Tensor,
        bias: Tensor | None,
        share_of_loss: Callable[..., Tensor],
    ) -> tuple[Tensor, SequenceLogps]:
        """The loss, and the log-probs whose sums gave it; share_of_loss as loss_of in `sequence_loss`."""
        args = (rows.take(hidden), lm_head_weight, rows.labels, rows.cu_seqlens)
        settings: dict[str, Any] = {"bias": bias, "workspace_bytes": self.workspace_bytes, "impl": self.impl}
        settings["rows"] = rows.token_rows
        if self.skip_tolerance == 0 and self.impl != "reference":
            return sequence_loss(*args, rows.group_ends, share_of_loss, **settings)
        found = sequence_logps(*args, skip_tolerance=self.skip_tolerance, **settings)
        return share_of_loss(found.sums, found.lengths, slice(None)), found


def checked_reference(
    use_ref_model: bool,
    target: Tensor,
    states: Mapping[str, Tensor | None],
    logps: Mapping[str, Tensor | None],
    unit: str,
) -> Reference:
    """The reference that a call gives: exactly one and a complete one, or none if use_ref_model is False.

    Args:
        target: (S, L).
        states: ref_input, ref_weight and ref_bias, in this order.
        logps: its log-probs by argument, each with one value for every `unit`, whose sequences are in as many parts of
            the batch as there are arguments.
    """
    given = [name for name, x in {**states, **logps}.items() if x is not None]
    if not use_ref_model:
        if given:
            raise ValueError(f"{given[0]} must be None if use_ref_model is False, got a value")
        return Reference()
    from_states, from_logps = [[name for name in given if name in group] for group in (states, logps)]
    names = " and ".join(logps)
    if from_states and from_logps:
        raise ValueError(f"{from_logps[0]} must be None if {from_states[0]} is given, got both: pass one reference")
    if not given:
        raise ValueError(f"ref_input and ref_weight, or {names}, must be given if use_ref_model is True, got neither")
    if from_states:
        hidden, weight, bias = states.values()
        if hidden is None or weight is None:
            missing = "ref_input" if hidden is None else "ref_weight"
            raise ValueError(f"{missing} must be given with {from_states[0]}, got None")
        check_matches("ref_input", hidden, target)
        return Reference(hidden=hidden, weight=weight, bias=bias)
    known = [x for x in logps.values() if x is not None]
    if len(known) < len(logps):
        raise ValueError(f"{names} must be given together, got only one of them")
    num_values = target.shape[0] // len(known)
    for name, x in zip(logps, known, strict=True):
        if tuple(x.shape) != (num_values,) or x.device != target.device:
            raise ValueError(
                f"{name} must have one value per {unit}, shape ({num_values},) on {target.device},"
                f" got {tuple(x.shape)} on {x.device}"
            )
    return Reference(logps=torch.stack(known, 1).flatten().detach())


def mean_logits(lm_head_weight: Tensor, mean_rows: Tensor, bias: Tensor | None) -> Tensor:
    """(G,) mean logits over the vocabulary and over the rows whose means are (G, H), because the head is linear."""
    with torch.autocast(lm_head_weight.device.type, enabled=False):
        bias = None if bias is None else bias.to(lm_head_weight.dtype)
        logits = F.linear(mean_rows.to(lm_head_weight.dtype), lm_head_weight, bias)  # (G, V)
        return logits.mean(-1, dtype=mean_rows.dtype)


def check_matches(name: str, hidden: Tensor, target: Tensor) -> None:
    if hidden.dim() != 3 or hidden.shape[:2] != target.shape:
        expected = f"({target.shape[0]}, {target.shape[1]}, H)"
        raise ValueError(f"{name} must have shape {expected} to match target, got {tuple(hidden.shape)}")


def check_head_width(lm_head_weight: Tensor, hidden: Tensor) -> None:
    if lm_head_weight.dim() != 2 or lm_head_weight.shape[1] != hidden.shape[2]:
        raise ValueError(
            f"lm_head_weight must have shape (V, {hidden.shape[2]}) to match hidden, got {tuple(lm_head_weight.shape)}"
        )
