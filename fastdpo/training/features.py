"""What DPOTrainer does around its loss: callbacks that the settings ask for, checkpoints that hold a moved reference,
and numbers of every pair for `compute_metrics` and `predict`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import EvalPrediction
from transformers.trainer_utils import EvalLoopOutput

from fastdpo.references import Reference
from fastdpo.training.base import FOR_NOTHING, PackedTrainer
from fastdpo.training.callbacks.predictions import Predictions, call_compute_metrics
from fastdpo.training.callbacks.samples import EvalSamples
from fastdpo.training.callbacks.sync_reference import SyncReference
from fastdpo.training.callbacks.watch import TrainingWatch
from fastdpo.training.settings.config import DPOConfig


class FeaturedTrainer(PackedTrainer):
    """Base of DPOTrainer; see the modules named above."""

    method = "dpo"
    args: DPOConfig
    reference: Reference
    reference_reason: str
    eval_samples: EvalSamples | None = None  # what policy and reference answered at each evaluation
    watch: TrainingWatch | None = None  # the warnings of this run
    _synced: SyncReference | None = None
    _predictions: Predictions | None = None  # while an evaluation collects them
    _pair_values: dict[str, Tensor]  # of the last batch, while an evaluation collects them

    def add_features(self) -> None:
        """To be called once model and reference are there.

        Raises:
            ValueError: a setting that cannot work with them.
        """
        args = self.args
        if self.compute_metrics is not None and args.include_for_metrics:
            raise ValueError(
                "include_for_metrics must be empty: compute_metrics gets the numbers of every pair and no inputs, got"
                f" {args.include_for_metrics}"
            )
        if args.sync_ref_model:
            self._synced = SyncReference(self)
            self.add_callback(self._synced)
            self.reference_reason += f"; it moves towards the policy every {args.ref_model_sync_steps} steps"
        if args.training_warnings:
            self.watch = TrainingWatch(self)
            self.add_callback(self.watch)
        if args.num_eval_samples:
            self.eval_samples = EvalSamples(self)
            self.add_callback(self.eval_samples)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self._synced is not None:
            self._synced.load(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self._synced is not None:  # what makes it the best was measured against the reference of that step
            self._synced.load(self.state.best_model_checkpoint)

    def _part_loss_sum(self, model: nn.Module, part: dict[str, Any]) -> Tensor:
        loss_sum = super()._part_loss_sum(model, part)
        if self._predictions is not None and FOR_NOTHING not in part:
            self._predictions.add_part(self._pair_values)
        return loss_sum

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        result = super().prediction_step(*args, **kwargs)
        if self._predictions is not None:
            self._predictions.end_batch()
        return result

    def evaluation_loop(  # type: ignore[override]  # names what the base hands through
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As in PackedTrainer, with `predictions` and `label_ids` of `callbacks/predictions.py` unless the loss is
        all that is asked for.
        """
        loss_only = self.args.prediction_loss_only if prediction_loss_only is None else prediction_loss_only
        self._predictions = None if loss_only else Predictions()
        try:
            output = super().evaluation_loop(
                dataloader,
                description,
                prediction_loss_only=prediction_loss_only,
                ignore_keys=ignore_keys,
                metric_key_prefix=metric_key_prefix,
            )
        finally:
            predictions, self._predictions = self._predictions, None
        if predictions is None:
            return output
        values, lengths = predictions.collected(self.args.world_size)
        output = output._replace(predictions=values, label_ids=lengths)
        if self.compute_metrics is not None:
            prediction = EvalPrediction(predictions=values, label_ids=lengths)  # type: ignore[arg-type]
            in_batches = self.args.batch_eval_metrics
            output.metrics.update(
                call_compute_metrics(self.compute_metrics, prediction, metric_key_prefix, in_batches=in_batches)
            )
        return output
