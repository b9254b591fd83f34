"""Metrics of a batch as (sum, weight) pairs, and their exact weighted means over any number of batches.

Keys are TRL's, plus `rewards/weight`, and `lengths/chosen` and `lengths/rejected`, the counted tokens of a response. On
several processes there is also `rank_imbalance`: the tokens of the slowest process over the mean, step by step.
Sums and weights are kept separate until `MetricMeans.pop`, so a mean over pairs weights every pair equally and a mean
over tokens every token, whatever the batch sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastdpo.ops.token_sums import Tokens, token_sums
from fastdpo.types import PairLogps, PairScores, TokenLogps

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
    """Sums of TRL's metrics over the B pairs, and of the gradient weight `sigmoid(-beta * margin)`.

    The weight is the factor by which DPO scales each pair's gradient: arXiv 2305.18290, sec. 4. All metrics are rows of
    one tensor with a single sum, because on a GPU each operation on a few numbers costs a launch.

    Args:
        per_token: use the rewards of SimPO and ORPO, beta times the mean over tokens; needs scores with lengths.
    """
    chosen_rewards, rejected_rewards = implicit_rewards(scores, beta, per_token=per_token)
    margins = chosen_rewards - rejected_rewards
    values = {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/accuracies": (chosen_rewards > rejected_rewards).to(margins.dtype),
        "rewards/margins": margins,
        "rewards/weight": torch.sigmoid(-margins),
        "logps/chosen": scores.policy_chosen_logps.detach(),
        "logps/rejected": scores.policy_rejected_logps.detach(),
    }
    for side, lengths in (("chosen", scores.chosen_lengths), ("rejected", scores.rejected_lengths)):
        if lengths is not None:
            values[f"lengths/{side}"] = lengths.to(margins.dtype)
    sums = torch.stack(list(values.values())).sum(1, dtype=torch.float64)
    num_pairs = float(margins.numel())
    return {key: (value, num_pairs) for key, value in zip(values, sums.unbind(), strict=True)}


def token_metrics(
    logps: PairLogps, token_rows: Tensor, cu_seqlens: Tensor, pairs: Tensor, *, impl: str = "auto"
) -> dict[str, SumAndWeight]:
    """Sums over counted tokens of the statistics that the head op returned; statistics that are None are skipped.

    Args:
        logps: log-probs with `logps.sequences.tokens` over the R rows of the LM head.
        token_rows, cu_seqlens, pairs: fields of the PackedBatch.
        impl: implementation of the head op, whose kernel computes the sums.
    """
    return metrics_of_tokens(token_statistics(logps.sequences.tokens, token_rows, cu_seqlens, impl=impl), pairs)


def token_statistics(
    tokens: TokenLogps, token_rows: Tensor, cu_seqlens: Tensor, *, impl: str = "auto"
) -> dict[str, Tensor]:
    """(S,) fp64 sums over the counted tokens of each sequence: the statistics of `tokens` that are not None, and
    "tokens", their number. Empty without statistics."""
    statistics = {name: getattr(tokens, name) for name in ("entropy", "mean_logits", "is_top1")}
    found = {name: value for name, value in statistics.items() if value is not None}
    if not found:
        return {}
    place = Tokens(cu_seqlens, token_rows)
    sums, _ = token_sums([x.detach() for x in found.values()], place, dtype=torch.float64, impl=impl)
    return {**dict(zip(found, sums, strict=True)), "tokens": cu_seqlens.diff().double()}


def metrics_of_tokens(statistics: Mapping[str, Tensor], pairs: Tensor) -> dict[str, SumAndWeight]:
    """The sums of `token_metrics`, from those of each sequence (`token_statistics`)."""
    if not statistics:
        return {}
    table = torch.stack(list(statistics.values()))  # (K + 1, S)
    of_sides = table[:, pairs.T].sum(2)  # (K + 1, 2): of the chosen, of the rejected
    sums = dict(zip(statistics, of_sides.unbind(), strict=True))
    num_chosen, num_rejected = sums["tokens"].unbind()
    metrics: dict[str, SumAndWeight] = {}
    if "entropy" in sums:
        metrics["entropy"] = (sums["entropy"].sum(), sums["tokens"].sum())
    if "mean_logits" in sums:
        metrics["logits/chosen"] = (sums["mean_logits"][0], num_chosen)
        metrics["logits/rejected"] = (sums["mean_logits"][1], num_rejected)
    if "is_top1" in sums:
        metrics["mean_token_accuracy"] = (sums["is_top1"][0], num_chosen)
    return metrics


class MetricMeans:
    """Weighted means over batches. Values stay on the device until `pop`, which reads them back in one transfer.

    Each batch adds one tensor; weights that are known on the host are summed there.
    """

    def __init__(self) -> None:
        self._tables: dict[tuple[tuple[str, ...], tuple[str, ...]], Tensor] = {}  # keys of sums, of weights: fp64
        self._weights: dict[str, float] = {}  # by key, weights known on the host

    def add(self, metrics: dict[str, SumAndWeight]) -> None:
        if not metrics:
            return
        on_device = {key: weight for key, (_, weight) in metrics.items() if isinstance(weight, Tensor)}
        for key, (_, weight) in metrics.items():
            self._weights[key] = self._weights.get(key, 0.0) + (0.0 if isinstance(weight, Tensor) else weight)
        numbers = [*(value for value, _ in metrics.values()), *on_device.values()]
        table = torch.stack([number.detach().double() for number in numbers])
        keys = tuple(metrics), tuple(on_device)
        self._tables[keys] = self._tables[keys] + table if keys in self._tables else table

    def peek(self) -> dict[str, float]:
        """The mean of each key since the last `pop` on this process, without a reset."""
        return _means(self._weights, self._table().tolist()) if self._tables else {}

    def pop(self, reduce: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """The mean of each key since the last `pop`. `reduce` sums the (K, 2) table of sums, weights over processes."""
        if not self._tables:
            return {}
        table = self._table()
        if reduce is not None:
            table = reduce(table)
        means = _means(self._weights, table.tolist())
        self._tables, self._weights = {}, {}
        return means

    def state(self) -> dict[str, Any]:
        """The sums since the last `pop` on this process, in types that JSON has."""
        tables = [[list(sums), list(weights), table.tolist()] for (sums, weights), table in self._tables.items()]
        return {"tables": tables, "weights": dict(self._weights)}

    def restore(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Continues from a `state`."""
        self._tables = {
            (tuple(sums), tuple(weights)): torch.tensor(numbers, dtype=torch.float64, device=device)
            for sums, weights, numbers in state["tables"]
        }
        self._weights = dict(state["weights"])

    def _table(self) -> Tensor:
        """(K, 2) fp64 sums and weights, in order of the keys' first appearance."""
        first = next(iter(self._tables.values()))
        columns = [torch.zeros(len(self._weights), dtype=torch.float64, device=first.device)]
        columns.append(torch.tensor(list(self._weights.values()), dtype=torch.float64, device=first.device))
        place = {key: number for number, key in enumerate(self._weights)}
        for names, numbers in self._tables.items():
            start = 0
            for column, keys in zip(columns, names, strict=True):
                index = torch.tensor([place[key] for key in keys], dtype=torch.int64, device=first.device)
                column.index_add_(0, index, numbers[start : start + len(keys)])
                start += len(keys)
        return torch.stack(columns, dim=1)


def _means(keys: Iterable[str], rows: list[list[float]]) -> dict[str, float]:
    return {key: value / weight for key, (value, weight) in zip(keys, rows, strict=True) if weight > 0}
