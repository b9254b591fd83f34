"""The result of a micro-batch, and an evaluation that collects such results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import EvalPrediction
from transformers.trainer_utils import EvalLoopOutput

from fastdpo.metrics import MetricMeans, SumAndWeight
from fastdpo.training.callbacks.predictions import Predictions, call_compute_metrics


@dataclass(frozen=True)
class StepResult:
    """The loss and metrics of one micro-batch."""

    loss: Tensor  # (), summed over the micro-batch's items, with a graph
    metrics: dict[str, SumAndWeight]
    pair_values: dict[str, Tensor] | None = None  # (B,) each, as in `callbacks/predictions.py`; only for predictions
    sums: dict[str, Tensor] | None = None  # (S,) log-probs of "policy" and "reference", nats, saved with a bad batch


@dataclass
class Evaluation:
    """One pass over an evaluation dataset."""

    mean_chosen_length: Tensor | None = None  # () over the whole dataset; only if a loss reads it
    predictions: Predictions | None = None  # values of every pair; None if only the loss is wanted
    means: MetricMeans = field(default_factory=MetricMeans)

    def add(self, result: StepResult, num_items: int) -> None:
        """Adds the result of a micro-batch."""
        self.means.add({**result.metrics, "loss": (result.loss.detach(), num_items)})
        if self.predictions is not None and result.pair_values is not None:
            self.predictions.add_part(result.pair_values)

    def end_batch(self) -> None:
        """Call this after the last micro-batch of each batch."""
        if self.predictions is not None:
            self.predictions.end_batch()

    def with_predictions(
        self, output: EvalLoopOutput, compute_metrics: Callable[..., dict[str, float]] | None, prefix: str, args: Any
    ) -> EvalLoopOutput:
        """Trainer's output, completed by `predictions`, `label_ids` and the metrics of `compute_metrics`."""
        if self.predictions is None:
            return output
        values, lengths = self.predictions.collected(args.world_size, args.row_group_size)
        if compute_metrics is not None:
            prediction = EvalPrediction(predictions=values, label_ids=lengths)  # type: ignore[arg-type]
            output.metrics.update(
                call_compute_metrics(compute_metrics, prediction, prefix, in_batches=args.batch_eval_metrics)
            )
        return output._replace(predictions=values, label_ids=lengths)
