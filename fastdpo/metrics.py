"""Metrics of a batch as (sum, weight) pairs, and their exact weighted means over any number of batches.

Keys are TRL's, plus `rewards/weight`, and `lengths/chosen` and `lengths/rejected`, the counted tokens of a response. A
mean over pairs weighs every pair alike and a mean over tokens every token, however the batches were cut, because sums
and weights are kept apart until `MetricMeans.pop`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastdpo.ops.sequence_logps import segment_sums
from fastdpo.types import PairLogps, PairScores

SumAndWeight = tuple[Tensor, Tensor | float]


def implicit_rewards(scores: PairScores, beta: float, *, per_token: bool = False) -> tuple[Tensor, Tensor]:
    """(B,) rewards of chosen and rejected, without gradient; `per_token` as in `pair_metrics`."""
    rewards = beta * scores.chosen_logratios.detach(), beta * scores.rejected_logratios.detach()
    if not per_token:
        return rewards
    assert scores.chosen_lengths is not None
    assert scores.rejected_lengths is not None
    return rewards[0] / scores.chosen_lengths.clamp(min=1), rewards[1] / scores.rejected_lengths.clamp(min=1)


def pair_metrics(scores: PairScores, beta: float, *, per_token: bool = False) -> dict[str, SumAndWeight]:
    """Sums over the B pairs of what TRL logs, and of the gradient weight `sigmoid(-beta * margin)`.

    The weight is the factor of the DPO gradient that vanishes once a pair is learned: arXiv 2305.18290, sec. 4.

    Args:
        per_token: rewards are those of SimPO and ORPO, beta times the mean over tokens, for scores with lengths.
    """
    chosen_rewards, rejected_rewards = implicit_rewards(scores, beta, per_token=per_token)
    values = {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/accuracies": (chosen_rewards > rejected_rewards).float(),
        "rewards/margins": chosen_rewards - rejected_rewards,
        "rewards/weight": torch.sigmoid(rejected_rewards - chosen_rewards),
        "logps/chosen": scores.policy_chosen_logps.detach(),
        "logps/rejected": scores.policy_rejected_logps.detach(),
    }
    for side, lengths in (("chosen", scores.chosen_lengths), ("rejected", scores.rejected_lengths)):
        if lengths is not None:
            values[f"lengths/{side}"] = lengths
    return {key: (value.sum(), float(value.numel())) for key, value in values.items()}


def token_metrics(logps: PairLogps, token_rows: Tensor, cu_seqlens: Tensor, pairs: Tensor) -> dict[str, SumAndWeight]:
    """Sums over counted tokens of the statistics that the head op returned; the ones it was not asked for are left out.

    Args:
        logps: with `logps.sequences.tokens` over the R rows that reached the head.
        token_rows, cu_seqlens, pairs: of the PackedBatch.
    """
    tokens = logps.sequences.tokens
    lengths = cu_seqlens.diff()

    def per_sequence(statistic: Tensor) -> Tensor:  # (R,) -> (S,)
        return segment_sums(statistic[token_rows], cu_seqlens)

    chosen, rejected = pairs.unbind(1)
    num_chosen, num_rejected = lengths[chosen].sum(), lengths[rejected].sum()
    metrics: dict[str, SumAndWeight] = {}
    if tokens.entropy is not None:
        entropy = per_sequence(tokens.entropy)
        metrics["entropy"] = (entropy[chosen].sum() + entropy[rejected].sum(), num_chosen + num_rejected)
    if tokens.mean_logits is not None:
        mean_logits = per_sequence(tokens.mean_logits)
        metrics["logits/chosen"] = (mean_logits[chosen].sum(), num_chosen)
        metrics["logits/rejected"] = (mean_logits[rejected].sum(), num_rejected)
    if tokens.is_top1 is not None:
        metrics["mean_token_accuracy"] = (per_sequence(tokens.is_top1)[chosen].sum(), num_chosen)
    return metrics


class MetricMeans:
    """Weighted means over batches. Values stay on the device until `pop`, which reads them back in one transfer."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, metrics: dict[str, SumAndWeight]) -> None:
        for key, (value, weight) in metrics.items():
            if not isinstance(weight, Tensor):  # filled in on the device: a copy from the host would wait for it
                weight = torch.full((), weight, dtype=torch.float64, device=value.device)
            pair = torch.stack([value.double(), weight.double()])
            self._sums[key] = self._sums[key] + pair if key in self._sums else pair

    def peek(self) -> dict[str, float]:
        """The mean of each key since the last `pop` on this process, left where it is."""
        return {key: (pair[0] / pair[1]).item() for key, pair in self._sums.items()}

    def pop(self, reduce: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """The mean of each key since the last `pop`. `reduce` sums the (K, 2) table of sums, weights over processes."""
        if not self._sums:
            return {}
        table = torch.stack(list(self._sums.values()))
        if reduce is not None:
            table = reduce(table)
        keys, self._sums = list(self._sums), {}
        return {key: value / weight for key, (value, weight) in zip(keys, table.tolist(), strict=True) if weight > 0}
