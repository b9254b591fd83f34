"""SteppingTrainer: one optimizer step, or one batch of an evaluation, in as many micro-batches as it takes.

In: the batches of the collator. Out: the loss, which is the exact mean over the items (pairs or tokens) of the whole
step on all processes, its gradient, and metrics with exact weights. Rows that accelerate repeats to fill a step do not
count. `memory/halving.py` runs the micro-batches; subclasses say what an item is and what its loss is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_utils import has_length

from fastdpo.metrics import MetricMeans
from fastdpo.training.callbacks.finite import FiniteLosses
from fastdpo.training.evaluation import Evaluation, StepResult
from fastdpo.training.inputs.collator import Example, examples_of, microbatches_of
from fastdpo.training.inputs.transfer import OneBuffer
from fastdpo.training.memory.halving import FOR_NOTHING, Halving
from fastdpo.training.memory.out_of_memory import OwnItems
from fastdpo.training.memory.row_parts import IN_PARTS, KNOWN, KnownWeights, RowPart, loss_of_part, loss_of_row
from fastdpo.training.memory.token_budget import steps_in_backward
from fastdpo.training.setup.sharding import backward_without_step, gathers_weights, reduces_in_backward
from fastdpo.training.updating import UpdatingTrainer
from fastdpo.types import PackedBatch


class SteppingTrainer(UpdatingTrainer):
    """A Trainer whose loss is a mean over the items of a step, however the step is split."""

    # every subclass's loss is already a mean over the step's items, so Trainer must not divide it again
    loss_is_scaled_for_ga = True
    sequence_group: Any  # the processes that compute rows together; None: each computes its own
    train_means: MetricMeans
    _halving: Halving
    _losses: FiniteLosses
    _num_train_tokens: int
    _evaluation: Evaluation | None = None  # the evaluation that is running
    _evaluated_rows: Any
    _examples: Sequence[tuple[Example, ...]]  # of each micro-batch of the batch that is evaluated

    # For subclasses to define

    def _num_items(self, inputs: dict[str, Any]) -> int:
        """The number of items (pairs or tokens) in a collated batch that the loss is a mean over."""
        raise TypeError(f"{type(self).__name__} must define _num_items, which counts the items of a batch")

    def _loss_sum(self, model: nn.Module, batch: PackedBatch) -> StepResult:
        """The summed loss of a micro-batch, and its metrics."""
        raise TypeError(f"{type(self).__name__} must define _loss_sum, the loss of a micro-batch")

    def _loss_of_row(
        self, model: nn.Module, batch: PackedBatch, parts: Sequence[RowPart], num_prompt: int
    ) -> tuple[StepResult, Tensor]:
        """The result of a row from forwards of its parts, without a graph; and the (S,) gradient of its loss in the
        log-probs of its sequences. Its prompt of so many tokens runs once; 0: with every part."""
        raise TypeError(f"{type(self).__name__} must define _loss_of_row, which runs a row in parts")

    def _head_settings(self) -> dict[str, Any]:
        """Settings of `packed_loss` in this run."""
        raise TypeError(f"{type(self).__name__} must define _head_settings, the settings of packed_loss")

    def _first_rows(self, inputs: dict[str, Any], num_rows: int) -> dict[str, Any]:
        """The batch, reduced to the items of its first `num_rows` rows."""
        raise TypeError(f"{type(self).__name__} must define _first_rows, which selects the items of the first rows")

    def _tell_step(self, parts: list[dict[str, Any]], reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        """Writes statistics of the whole optimizer step, which some losses need, into each of its micro-batches.

        `reduce` sums over processes. A loss that is a sum over items needs no statistics.
        """

    # A step

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor | None:
        """The number of items in all micro-batches of one optimizer step, on all processes.

        On several processes, a row that accelerate repeats in an epoch's last step is dropped from the batch, and the
        imbalance of the step is recorded.
        """
        num_tokens = sum(part["input_ids"].numel() for inputs in batch_samples for part in microbatches_of(inputs))
        if batch_samples:
            self._drop_repeated_rows(batch_samples[-1])
        parts = [part for inputs in batch_samples for part in microbatches_of(inputs)]
        self._tell_step(parts, self._reduce)
        num_items = sum(self._num_items(part) for part in parts)
        count = torch.full((), num_items, device=device)  # fills: a copy from the host would wait for the device
        if self.args.world_size > 1:
            counts = self.accelerator.gather(torch.stack([count, torch.full_like(count, num_tokens)])[None])
            self.train_means.add({"rank_imbalance": (counts[:, 1].max(), counts[:, 1].double().mean())})
            count = counts[:, 0].sum()
        return count

    def _drop_repeated_rows(self, inputs: dict[str, Any]) -> None:
        """Takes the items of repeated rows out of a step's last batch, in place. Their tokens still run, because the
        other processes wait for this one."""
        num_rows = self._num_own_rows(self.args.train_batch_size, self.train_dataset)
        if num_rows is None or any(part.get("example_ids") is None for part in microbatches_of(inputs)):
            return
        for part in microbatches_of(inputs):
            part.update(self._first_rows(part, num_rows))
        if isinstance(inputs, OneBuffer):
            inputs.num_own_rows = num_rows

    def _own_items(self, num_rows: int | None) -> OwnItems | None:
        """A function that keeps the items of this many rows, the first of a batch; None if all are kept."""
        return None if num_rows is None else partial(self._first_rows, num_rows=num_rows)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Runs Trainer's step once per micro-batch of the batch. Gradients are reduced after the last one."""
        parts = microbatches_of(inputs)
        if num_items_in_batch is None:  # called from outside the loop: the mean over this batch
            self._tell_step(parts)
            num_items_in_batch = sum(self._num_items(part) for part in parts) * self.accelerator.num_processes
        model.train()  # Trainer does so too, but only after the first pass of a row in parts
        if callable(train := getattr(self.optimizer, "train", None)):
            train()
        examples, parts = examples_of(inputs), self._in_step(parts, is_training=True)
        examples = [*[None] * (len(parts) - len(examples)), *examples]
        losses = self._halving.train(
            self._forward_and_backward,
            model,
            parts,
            examples,
            num_items=num_items_in_batch,
            dataset=self.train_dataset,
            without_step=partial(backward_without_step, self.accelerator),
            own_items=self._own_items(getattr(inputs, "num_own_rows", None)),
            reduces=self._has_copies() and self.accelerator.sync_gradients,
        )
        if self.accelerator.sync_gradients:  # the optimizer steps next
            self._halving.end_step()
            self._losses.check(self)
        return self._sum_of(losses)

    def _why_whole(self) -> str:
        """Why a micro-batch must not be halved when memory runs out; empty if it may."""
        if steps_in_backward(self):
            return "the optimizer steps in backward"
        if self._shards_weights() or (self.args.world_size > 1 and not self._has_copies()):
            return "other processes would wait for this one"
        return ""

    def _has_copies(self) -> bool:
        """Whether each of several processes has a copy of the model, and they meet only to reduce gradients."""
        is_ddp = self.accelerator.distributed_type.startswith("MULTI_") and not self._shards_weights()
        return self.args.world_size > 1 and is_ddp and self.sequence_group is None

    def _shards_weights(self) -> bool:
        """Whether processes gather weights in every forward, so that all must run the same number of forwards."""
        loaded_in_shards = getattr(self, "is_distributed_loading_by_transformers", False)
        return gathers_weights(self.accelerator) or loaded_in_shards

    def _in_step(self, parts: list[dict[str, Any]], *, is_training: bool) -> list[dict[str, Any]]:
        """Where all processes must run equally many micro-batches, adds ones that do not count, before the others."""
        keeps_step = self._shards_weights() or (is_training and reduces_in_backward(self.accelerator))
        if self.args.max_tokens_per_microbatch is None or not keeps_step:
            return parts
        count = torch.tensor([len(parts)], device=self.args.device)
        missing = int(self.accelerator.gather(count).max()) - len(parts)
        return [*({**parts[0], FOR_NOTHING: True} for _ in range(missing)), *parts]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss summed over the batch's items, divided by the number of items in the whole optimizer step.

        In evaluation it is divided by the number of items in the batch.
        """
        is_training = model.training
        parts = microbatches_of(inputs)
        if not is_training or num_items_in_batch is None:
            self._tell_step(parts)
        if is_training:
            sums = [self._part_loss_sum(model, part) for part in parts]
        else:
            parts = [self._without_repeated_rows(part) for part in self._in_step(parts, is_training=False)]
            known = self._examples if len(self._examples) == len(parts) else [None] * len(parts)
            own_items = self._own_items(self._num_own_rows(self.args.eval_batch_size))
            loss_of = partial(self._part_loss_sum, model)
            sums = [
                loss
                for part, rows in zip(parts, known, strict=True)
                for loss in self._halving.evaluate(model, loss_of, part, rows, self._evaluated_rows, own_items)
            ]
        loss_sum = self._sum_of(sums)
        if self._evaluation is not None and not is_training:
            self._evaluation.end_batch()
        if num_items_in_batch is None or not is_training:
            loss = loss_sum / max(sum(self._num_items(part) for part in parts if FOR_NOTHING not in part), 1)
        else:  # gradients are averaged over processes, the divisor already counts the items of all of them
            loss = loss_sum * self.accelerator.num_processes / num_items_in_batch
        return (loss, {}) if return_outputs else loss

    def _part_loss_sum(self, model: nn.Module, part: dict[str, Any]) -> Tensor:
        """The summed loss of one micro-batch. Also records its metrics."""
        is_for_nothing = FOR_NOTHING in part
        part = {key: value for key, value in part.items() if key != FOR_NOTHING}
        if IN_PARTS in part:
            with self.accelerator.autocast():
                return loss_of_row(model, part[IN_PARTS], **self._head_settings())
        if KNOWN in part:
            with self.accelerator.autocast():
                return loss_of_part(model, part, **self._head_settings()) * (0.0 if is_for_nothing else 1.0)
        batch = PackedBatch(**part)
        with self.accelerator.autocast():  # for policy and reference, whether accelerate wraps them or not
            result = self._loss_sum(model, batch)
        if is_for_nothing:
            return result.loss * 0.0
        self._add_result(model, result, part, batch)
        return result.loss

    def _first_pass(
        self, model: nn.Module, row: dict[str, Any], parts: Sequence[RowPart], num_prompt: int
    ) -> list[KnownWeights]:
        """The weights of a row's parts. Also records the row's metrics."""
        row = self._prepare_inputs(row)
        batch = PackedBatch(**row)
        with torch.no_grad(), self.accelerator.autocast():
            result, weights = self._loss_of_row(model, batch, parts, num_prompt)
        self._add_result(model, result, row, batch)
        none = torch.zeros_like(result.loss)
        return [KnownWeights(weights[list(part.sequences)], none if i else result.loss) for i, part in enumerate(parts)]

    def _add_result(self, model: nn.Module, result: StepResult, part: dict[str, Any], batch: PackedBatch) -> None:
        """Adds the result of a micro-batch to the metrics of training or of the evaluation."""
        if self._is_measuring:
            return
        if model.training:
            self._halving.record(partial(self._record, result, part, batch.num_tokens))
        elif self._evaluation is not None:
            self._evaluation.add(result, self._num_items(part))

    def _sum_of(self, losses: list[Tensor]) -> Tensor:
        """The sum; 0 if no row of a batch fits into memory."""
        return torch.stack(losses).sum() if losses else torch.zeros((), device=self.args.device)

    def _record(self, result: StepResult, part: dict[str, Any], num_tokens: int) -> None:
        """Adds a micro-batch to the metrics and to the losses that are checked."""
        self.train_means.add(result.metrics)
        self._num_train_tokens += num_tokens
        self._losses.add(result.loss, part, result.sums)
        if steps_in_backward(self) and (self.accelerator.sync_gradients or not self.is_deepspeed_enabled):
            self._losses.check(self)  # the weights change in the backward that comes next

    def _loss_of(self, batch: PackedBatch) -> Tensor:
        """The loss of a batch by itself, in the precision of the run."""
        with self.accelerator.autocast():
            return self._loss_sum(self.model, batch).loss

    def _without_repeated_rows(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch without the rows that accelerate repeats in the last step to give all processes equally many."""
        num_rows = self._num_own_rows(self.args.eval_batch_size)
        if num_rows is None:
            return inputs
        if inputs.get("example_ids") is None:
            raise ValueError("data_collator must return example_ids in an evaluation on several processes, got None")
        return self._first_rows(inputs, num_rows)

    def _num_own_rows(self, batch_size: int, dataset: Any = None) -> int | None:
        """The number of rows in this process's batch that no process has had before; None if that is all of them.

        Args:
            dataset: of training. A loader of accelerate that skips batches, with which a resumed run begins, does not
                know how many rows are left for its last batch.
        """
        state = self.accelerator.gradient_state
        if self.args.world_size == 1 or not state.end_of_dataloader:
            return None
        num_left = state.remainder
        if num_left < 0 and has_length(dataset) and not self.args.dataloader_drop_last:
            num_left = len(dataset) % (batch_size * self.args.data_parallel_size)
        if num_left <= 0:
            return None
        return min(max(num_left - self.args.data_parallel_index * batch_size, 0), batch_size)

    def _prepare_input(self, data: Any) -> Any:
        """Moves tensors without rounding. Trainer would round floats to the weights' dtype under DeepSpeed, so cached
        log-probs would lose digits."""
        return data.to(self.args.device) if isinstance(data, Tensor) else super()._prepare_input(data)

    def _reduce(self, table: Tensor) -> Tensor:
        return self.accelerator.reduce(table, "sum") if self.args.world_size > 1 else table
