"""TokenMeans: what a loss that is a mean over tokens has to know before its first batch runs.

In: the batches of an optimizer step, or the rows of an evaluation. Out: `mean_chosen_length`, the counted tokens per
chosen response of all of them, on all processes. With it the likelihood terms (sft, orpo, cpo) are sums over pairs: a
step can be split, and an evaluation has the same loss whatever its batch size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from fastdpo.data.batches.layout import counted_sequences
from fastdpo.losses import LOSSES
from fastdpo.references.rows import read_groups
from fastdpo.training.inputs.collator import microbatches_of
from fastdpo.training.settings.config import DPOConfig

if TYPE_CHECKING:
    from fastdpo.training.base import PackedTrainer as Base
else:
    Base = object

_ROWS_AT_A_TIME = 1000


class TokenMeans(Base):
    """Part of DPOTrainer; stands before PackedTrainer among its bases."""

    args: DPOConfig
    mean_chosen_length: Tensor | None = None  # (), None where no loss reads it
    _of_evaluation: Tensor | None = None  # that of the rows that are being evaluated

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor | None:
        self._count(batch_samples, everywhere=True)
        return super()._get_num_items_in_batch(batch_samples, device)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        if num_items_in_batch is None:  # called from outside the loop
            self._count([inputs])
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if not model.training and self._of_evaluation is not None:
            self.mean_chosen_length = self._of_evaluation
        elif num_items_in_batch is None or not model.training:
            self._count([inputs])
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Trainer's. A stream is not read beforehand: there the mean is that of each batch."""
        dataset = getattr(args[0] if args else kwargs["dataloader"], "dataset", None)
        if self._reads_mean() and isinstance(dataset, Dataset):
            mean = mean_chosen_length_of(dataset)
            self._of_evaluation = torch.tensor(mean, dtype=torch.float32, device=self.args.device)
        try:
            return super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        finally:
            self._of_evaluation = None

    def _reads_mean(self) -> bool:
        return any(LOSSES[name].likelihood for name in self.args.loss_type)

    def _count(self, batches: list[dict[str, Any]], *, everywhere: bool = False) -> None:
        """Sets the mean to that of these batches, of all processes where `everywhere`."""
        if not self._reads_mean():
            return
        parts = [part for inputs in batches for part in microbatches_of(inputs)]
        counts = torch.zeros(2, dtype=torch.int64, device=self.args.device)  # tokens, pairs; a stream may have ended
        for part in parts:
            counts[0] += part["cu_seqlens"].diff()[part["pairs"][:, 0]].sum().to(counts.device)
            counts[1] += len(part["pairs"])
        if everywhere and self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, "sum")
        self.mean_chosen_length = counts[0] / counts[1].clamp(min=1)


def mean_chosen_length_of(dataset: Dataset) -> float:
    """Counted tokens per chosen response over all pairs of a prepared dataset."""
    num_tokens = num_pairs = 0
    for start in range(0, len(dataset), _ROWS_AT_A_TIME):
        for group in read_groups(dataset, range(start, min(start + _ROWS_AT_A_TIME, len(dataset)))):
            lengths = [int(sequence.is_counted.sum()) for sequence in counted_sequences(group)]
            num_tokens += sum(lengths[chosen] for chosen, _ in group.preferences)
            num_pairs += len(group.preferences)
    return num_tokens / max(num_pairs, 1)
