"""The input of `compute_metrics` and the result of `predict`: values of every pair, in the order of the dataset's rows.

In: the log-probs of each batch of an evaluation. Out: transformers' EvalPrediction, with
    predictions: {name: (N,) array} for the names in PAIR_VALUES, log-probs summed over the response, in nats
    label_ids: (N, 2) int64, counted tokens of the chosen and of the rejected response
N counts pairs: a row of K ranked responses contributes all of its pairs. Logits are never computed, so a function that
needs them must run the model itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import EvalPrediction

from fastdpo.metrics import implicit_rewards
from fastdpo.types import PackedBatch, PairScores

PAIR_VALUES = (
    "chosen_logps",
    "rejected_logps",
    "ref_chosen_logps",
    "ref_rejected_logps",
    "chosen_rewards",
    "rejected_rewards",
)
_LENGTHS = ("chosen_lengths", "rejected_lengths")
_EXAMPLE = "example"


def pair_values(scores: PairScores, batch: PackedBatch, beta: float, *, per_token: bool = False) -> dict[str, Tensor]:
    """(B,) each: PAIR_VALUES, lengths, and the number of the pair's example in the collated batch (0 if the collator
    does not return example_ids).

    Args:
        per_token: whether rewards are means over tokens, as in the metrics of the run.
    """
    chosen_rewards, rejected_rewards = implicit_rewards(scores, beta, per_token=per_token)
    chosen = batch.pairs[:, 0]
    assert scores.chosen_lengths is not None
    assert scores.rejected_lengths is not None
    values = {
        "chosen_logps": scores.policy_chosen_logps,
        "rejected_logps": scores.policy_rejected_logps,
        "ref_chosen_logps": scores.ref_chosen_logps,
        "ref_rejected_logps": scores.ref_rejected_logps,
        "chosen_rewards": chosen_rewards,
        "rejected_rewards": rejected_rewards,
        "chosen_lengths": scores.chosen_lengths,
        "rejected_lengths": scores.rejected_lengths,
        _EXAMPLE: torch.zeros_like(chosen) if batch.example_ids is None else batch.example_ids[chosen],
    }
    return {name: value.detach() for name, value in values.items()}


@dataclass
class Predictions:
    """Collects pair values batch by batch, and sorts those of a batch's micro-batches by example."""

    batches: list[dict[str, Tensor]] = field(default_factory=list)
    _parts: list[dict[str, Tensor]] = field(default_factory=list)

    def add_part(self, values: dict[str, Tensor]) -> None:
        self._parts.append(values)

    def end_batch(self) -> None:
        if not self._parts:
            return
        names = self._parts[0]
        joined = {name: torch.cat([part[name] for part in self._parts]) for name in names}
        self._parts = []
        order = torch.argsort(joined.pop(_EXAMPLE), stable=True)
        self.batches.append({name: values[order] for name, values in joined.items()})

    def collected(self, num_processes: int, num_copies: int = 1) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """`predictions` and `label_ids` over the batches of all processes. The processes take batches in turn; of
        `num_copies` consecutive ones, all have the same batches."""
        batches = [{name: values.cpu().numpy() for name, values in batch.items()} for batch in self.batches]
        per_process = gather_object([batches]) if num_processes > 1 else [batches]
        per_process = per_process[::num_copies]
        num_steps = max((len(batches) for batches in per_process), default=0)
        in_order = [batches[step] for step in range(num_steps) for batches in per_process if step < len(batches)]

        def joined(name: str) -> np.ndarray:
            return np.concatenate([batch[name] for batch in in_order]) if in_order else np.zeros(0)

        return {name: joined(name) for name in PAIR_VALUES}, np.stack([joined(name) for name in _LENGTHS], axis=1)


def call_compute_metrics(
    compute_metrics: Callable[..., dict[str, float]], prediction: EvalPrediction, prefix: str, *, in_batches: bool
) -> dict[str, Any]:
    """The metrics of the user's function, each with the prefix.

    Args:
        in_batches: whether `batch_eval_metrics` is set. The function then takes `compute_result`, and is called once,
            over all pairs, with True.
    Raises:
        ValueError: the function failed, for example because it expects logits, or did not return a dict.
    """
    try:
        metrics = compute_metrics(prediction, compute_result=True) if in_batches else compute_metrics(prediction)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"compute_metrics must take predictions as a dict of (N,) arrays ({', '.join(PAIR_VALUES)}) and label_ids"
            f" as (N, 2) counts of tokens; no logits exist. It raised {type(error).__name__}: {error}"
        ) from error
    if not isinstance(metrics, dict):
        raise ValueError(f"compute_metrics must return a dict of metrics by name, got {type(metrics).__name__}")
    return {name if name.startswith(f"{prefix}_") else f"{prefix}_{name}": value for name, value in metrics.items()}
