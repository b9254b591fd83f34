"""PackedTrainer: the common base of preference training and supervised fine-tuning, on top of transformers.Trainer.

Trainer keeps the loop, checkpoints, distribution and logging. The layers below add exact resuming, updates of weights,
and steps that are exact means in any number of micro-batches. This class puts a run together: model, data, packing and
its check, the optimizer's and the head's settings; and adds evaluation, logging, saving, and a stop at the first loss
that is not finite.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import logging

from fastdpo.data.prepare import Report
from fastdpo.locks import locked
from fastdpo.metrics import MetricMeans
from fastdpo.modeling import PackingCheck, check_packing, prepare_model
from fastdpo.modeling.sequence_check import check_sequence_parallel
from fastdpo.ops.engine import resolve_impl
from fastdpo.references import Reference
from fastdpo.references.adapters import (
    REFERENCE_ADAPTER,
    is_peft_model,
    without_reference_adapter,
    without_reference_weights,
)
from fastdpo.training.callbacks.finite import FiniteLosses
from fastdpo.training.callbacks.model_card import ModelCard, tag_model
from fastdpo.training.callbacks.offload import OffloadAtStart
from fastdpo.training.callbacks.summary import print_summary, summary_text
from fastdpo.training.evaluation import Evaluation
from fastdpo.training.inputs.balanced import balanced
from fastdpo.training.inputs.collator import collator_for, examples_of, microbatches_of
from fastdpo.training.inputs.order import sampler_for
from fastdpo.training.inputs.prepared_rows import check_rows, warn_of_lost_rows
from fastdpo.training.inputs.streams import (
    StreamStart,
    check_stream_settings,
    guarded,
    is_stream,
    read_whole,
    why_unrepeatable,
)
from fastdpo.training.memory.estimate import check_memory_settings, checkpointing_kwargs
from fastdpo.training.memory.halving import Halving
from fastdpo.training.memory.out_of_memory import OutOfMemory
from fastdpo.training.memory.row_parts import why_prompt_of_run_repeats
from fastdpo.training.memory.token_budget import (
    BudgetAtStart,
    check_can_run_in_parts,
    check_can_split,
    check_row_sizes,
    steps_in_backward,
)
from fastdpo.training.saving.checkpoints import checkpoint_folder
from fastdpo.training.saving.disk import bytes_of_save
from fastdpo.training.saving.dry_save import check_can_save
from fastdpo.training.saving.engines import check_can_continue, load_weights
from fastdpo.training.saving.saved import SavedModel
from fastdpo.training.saving.staging import UNFINISHED, put_in_place, restore_unfinished
from fastdpo.training.settings.engine import EngineConfig
from fastdpo.training.setup.accelerator import KeptAccelerator
from fastdpo.training.setup.experts import router_coefficient
from fastdpo.training.setup.failures import failing_together
from fastdpo.training.setup.layer_kernels import use_layer_kernels
from fastdpo.training.setup.models import disable_dropout, forget_accelerate, head_dtype, keep_4_bits_trainable
from fastdpo.training.setup.optimizers import optimizer_name
from fastdpo.training.setup.sequence_parallel import (
    check_engine_of_groups,
    check_rotary,
    read_same_rows,
    sequence_group,
)
from fastdpo.training.setup.sharding import (
    check_not_divided,
    keep_outputs_whole,
)
from fastdpo.training.setup.tensor_parallel import check_not_resumed, is_cut, reshard
from fastdpo.training.setup.tiles import use_tiles_in_run
from fastdpo.training.stepping import SteppingTrainer
from fastdpo.training.updates.checks import check_rounded_weights, check_updates

logger = logging.get_logger(__name__)


class PackedTrainer(SteppingTrainer):
    """Base of DPOTrainer and SFTTrainer, which describe the arguments."""

    accelerator = KeptAccelerator()
    method = ""  # "dpo" or "sft": the tag of the model and of its card
    args: EngineConfig
    reference: Reference | None = None
    reference_reason = ""
    dataset_name: str | None = None  # for the model card, if the dataset has a name
    _summary_is_due = True

    def __init__(
        self,
        model: nn.Module,
        args: EngineConfig,
        data_collator: Callable[..., dict[str, Any]] | None,
        train_dataset: Any,
        eval_dataset: Any,
        processing_class: PreTrainedTokenizerBase,
        processor: ProcessorMixin | None,
        callbacks: list[TrainerCallback] | None,
        **trainer_arguments: Any,
    ) -> None:
        self.data_reports: dict[str, Report] = {}  # by "train", "eval" or "eval_<name>"
        self.warnings_given: dict[str, str] = {}  # name -> message of each training warning
        self.train_means = MetricMeans()  # since the last log
        self._num_train_tokens = 0  # since the last log
        self._losses = FiniteLosses()
        self._examples: list[Any] = []  # the rows of the batch that is evaluated
        self._evaluated_rows: Any = None
        tokenizer = self.processing_class = processing_class
        self.args = args
        has_own_optimizer = trainer_arguments.get("optimizers", (None, None))[0] is not None
        if not has_own_optimizer:
            check_memory_settings(args)
        check_updates(args, optimizer_name(args), is_own=has_own_optimizer)
        check_rounded_weights(args, model)
        forget_accelerate(model)
        keep_4_bits_trainable(model)
        check_not_divided(model)
        use_layer_kernels(model, args)
        prepare_model(model)

        check_stream_settings(args, train_dataset, eval_dataset)
        if is_stream(train_dataset) and (why := why_unrepeatable(train_dataset)) is not None:
            logger.warning(f"A run on this training stream cannot be resumed exactly: {why}")
        train_dataset = self._prepared(train_dataset, "train", model)
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: self._prepared(part, f"eval_{name}", model) for name, part in eval_dataset.items()}
        else:
            eval_dataset = self._prepared(eval_dataset, "eval", model)

        if args.disable_dropout:
            disable_dropout(model)
        if args.n_gpu > 1:
            logger.warning(
                "Using one GPU: DataParallel cannot split a packed row. Use `accelerate launch` to train on all GPUs."
            )
            args._n_gpu = 1
        if args.has_default_workers and is_stream(train_dataset):
            args.dataloader_num_workers = 0  # a stream divides its shards itself
        budget = args.max_tokens_per_microbatch
        if type(data_collator).__module__.partition(".")[0] == "trl":
            raise ValueError(
                f"data_collator must return PackedBatch.asdict(), got TRL's {type(data_collator).__name__}; remove it"
            )
        if data_collator is not None and args.sequence_parallel_size > 1:
            raise ValueError(
                "data_collator must be None if sequence_parallel_size is above 1, because only fastdpo's collator"
                f" divides batches, got {type(data_collator).__name__}"
            )
        if data_collator is not None and budget is not None:
            raise ValueError(
                "data_collator must be None if max_tokens_per_microbatch is set, because only fastdpo's collator splits"
                f" batches, got {type(data_collator).__name__} and {budget}"
            )
        self.collator = collator_for(args, tokenizer)
        self.out_of_memory = OutOfMemory(self.collator, args.on_oversized_row)
        self.card = ModelCard(self)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or self.collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=[self.card, *(callbacks or ())],  # first, so that later callbacks find the card in a checkpoint
            **trainer_arguments,
        )
        check_engine_of_groups(args, is_deepspeed=self.is_deepspeed_enabled)
        if checkpointing_kwargs(args).get("offload"):
            self.add_callback(OffloadAtStart())
        keep_outputs_whole(self.accelerator)
        self.watch_progress()
        self.watch_updates()
        if is_stream(self.train_dataset):
            self.parts["stream"] = StreamStart(self.train_dataset)
        tag_model(self.model, self.method)
        self.saved = SavedModel(self, processor)
        self.model_accepts_loss_kwargs = True  # Trainer then counts items through _get_num_items_in_batch
        resolve_impl(args.impl, args.device, head_dtype(self.model, args))  # a named impl that cannot run raises here
        self.router_aux_loss_coef = router_coefficient(args, self.model)
        self.is_packed = args.packing != "padded"
        self.sequence_group = sequence_group(args)
        check_rotary(args, self.model)
        self.packing_check = self._check_packing(self.model)
        self.out_of_memory.cannot_split = self._why_whole()
        self.out_of_memory.repeats_prompt = why_prompt_of_run_repeats(self)
        self._halving = Halving(self.out_of_memory, self._first_pass, steps_in_backward=steps_in_backward(self))
        check_can_run_in_parts(self, data_collator, shards_weights=self._shards_weights())
        if budget is not None:
            check_can_split(self)
            self.add_callback(BudgetAtStart(self, self._loss_of))
        evaluated = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
        for name, dataset in {"train": self.train_dataset, **evaluated}.items():
            if dataset is not None:
                check_row_sizes(dataset, name, self.collator, args.on_oversized_row)

    # For subclasses to define

    def _prepare_dataset(self, dataset: Any) -> tuple[Any, Report]:
        """The dataset as token columns, and a report on its rows."""
        raise TypeError(f"{type(self).__name__} must define _prepare_dataset, which tokenizes the dataset")

    def _start_evaluation(self, dataset: Any, *, loss_only: bool) -> Evaluation:
        """An empty Evaluation, with the statistics of the whole `dataset` that the losses need."""
        return Evaluation()

    # Before training

    def _prepared(self, dataset: Any, name: str, model: nn.Module) -> Dataset | None:
        """The tokenized dataset, with its report stored. None stays None; a tokenized dataset is not changed."""
        if dataset is None:
            return None
        if is_stream(dataset) and name != "train" and self.args.world_size > 1:
            dataset = read_whole(dataset)
        with self.args.main_process_first(desc=f"tokenizing the {name} dataset"):
            prepared, self.data_reports[name] = self._prepare_dataset(dataset)
        if is_stream(prepared):
            return guarded(prepared, model, name)
        check_rows(model, prepared, name)
        warn_of_lost_rows(self.data_reports[name], name, self.args)
        return prepared

    def _check_packing(self, model: nn.Module) -> PackingCheck:
        """Checks a model on this device, and falls back to padded batches if packed ones would be wrong.

        Raises:
            ValueError: packing is 'packed' and the model fails the check, or fastdpo does not support the model's head.
        """
        prepare_model(
            model,
            attention_backend=self.args.attention_backend if self.is_packed else "auto",
            skip_tolerance=self.args.skip_tolerance,
            workspace_bytes=self.args.workspace_bytes,
        )
        check = check_packing(model, impl=self.args.impl, autocast=self.accelerator.autocast)
        if is_cut(model):
            reshard(model)
        if self.is_packed and not check.ok:
            if self.args.packing == "packed":
                raise ValueError(f"packing must be 'auto' or 'padded' for this model, got 'packed': {check.reason}")
            logger.warning(f"Falling back to padded batches, which are slower: {check.reason}")
            self.is_packed = False
        self.collator.is_packed = self.is_packed
        use_tiles_in_run(model, self)
        if self.sequence_group is not None:
            check_sequence_parallel(model, self.sequence_group, check, impl=self.args.impl)
        return check

    def summary(self) -> str:
        """A summary of the run as text: model, data, reference, batches, attention, head op, steps and peak memory."""
        return summary_text(self)

    def print_summary(self, *more: tuple[str, str]) -> None:
        """Prints the summary and further (what, fact) lines on the main process. `train` does not print it again."""
        self._summary_is_due = False
        if self.is_world_process_zero():
            print_summary(self, more)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer, and also works after an evaluation (see `forget_accelerate`). Prints the summary first, unless
        `disable_tqdm` is set.

        Raises:
            ValueError: `resume_from_checkpoint` is no checkpoint of such a run, saving a checkpoint would fail, or
                another process trains in the same output directory.
        """
        folder = Path(self.args.output_dir)
        lock = locked(folder, "output_dir") if self.args.should_save else nullcontext()
        with failing_together(self.args), lock:
            if self.args.should_save:
                restore_unfinished(folder)
            output = self._train(resume_from_checkpoint, *args, **kwargs)
        return output._replace(training_loss=output.metrics["train_loss"])

    def _train(self, resume_from_checkpoint: str | bool | None, *args: Any, **kwargs: Any) -> Any:
        has_adapter = is_peft_model(self.model)
        resume = checkpoint_folder(resume_from_checkpoint, self.args.output_dir, has_adapter=has_adapter)
        if resume is not None:
            check_can_continue(resume, self, self.get_total_train_batch_size(self.args))
        check_can_save(self, self.saved, self.card.write, is_sharded=self._shards_weights())
        if self.train_dataset is not None and self._summary_is_due and not self.args.disable_tqdm:
            self.print_summary()
        if self.model_wrapped is self.model:
            self.accelerator._models = [model for model in self.accelerator._models if model is not self.model]
            forget_accelerate(self.model)
        if is_cut(self.model):
            check_not_resumed(resume)
            reshard(self.model)  # an evaluation may have gathered weights
        self._halving.end_step()
        output = super().train(resume, *args, **kwargs)
        self._losses.settle(self)
        return output

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int] | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        own = sampler_for(self.args, dataset, lambda: int(self.state.epoch or 0))
        return super()._get_train_sampler(train_dataset) if own is None else own

    def get_train_dataloader(self) -> Any:
        """As in Trainer; on several processes, all get about equally many tokens in every step."""
        return balanced(read_same_rows(super().get_train_dataloader(), self.args), self.train_dataset, self.args)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        return read_same_rows(super().get_eval_dataloader(eval_dataset), self.args)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        return read_same_rows(super().get_test_dataloader(test_dataset), self.args)

    def get_total_train_batch_size(self, args: Any) -> int:
        """As in Trainer. Processes that compute rows together read the same ones."""
        return int(super().get_total_train_batch_size(args)) // self.args.sequence_parallel_size

    # Logging and evaluation

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """Gives Trainer the one attention mask that it expects: packed rows have none, micro-batches one each."""
        if self.args.include_num_input_tokens_seen == "non_padding":
            masks = [(part["input_ids"], part.get("attention_mask")) for part in microbatches_of(inputs)]
            flat = [(torch.ones_like(ids) if mask is None else mask).flatten() for ids, mask in masks]
            inputs = {**inputs, "attention_mask": torch.cat(flat)}
        if self.sequence_group is not None and self.sequence_group.rank > 0:  # another process counts these tokens
            named = {name: inputs.get(name) for name in ("input_ids", "attention_mask")}
            inputs = {**inputs, **{name: x[..., :0] for name, x in named.items() if x is not None}}
        super()._track_num_input_tokens(inputs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self._losses.settle(self)
        if "loss" in logs:
            logs.update(self.train_means.pop(self._reduce))
            logs["num_tokens"] = self._num_tokens_so_far()
            self._num_train_tokens = 0
        super().log(logs, start_time)

    def _num_tokens_so_far(self) -> int:
        """Tokens that have run on all processes since the run began: as in TRL, rows that accelerate repeats to fill an
        epoch's last step too."""
        num_new_tokens = torch.tensor(self._num_train_tokens, device=self.args.device)
        before = (entry["num_tokens"] for entry in reversed(self.state.log_history) if "num_tokens" in entry)
        return next(before, 0) + int(self._reduce(num_new_tokens)) // self.args.row_group_size

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        """The loss alone: no logits exist that could be returned."""
        self.check_interrupted()
        self._examples = examples_of(inputs)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        self._examples = []
        return loss.detach(), None, None

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Trainer's loop, with means over items instead of means over batches.

        `predictions` and `label_ids` are described in `callbacks/predictions.py`. They are None if only the loss is
        wanted.
        """
        self._losses.settle(self)
        loss_only = self.args.prediction_loss_only if prediction_loss_only is None else prediction_loss_only
        dataset = self._evaluated_rows = getattr(dataloader, "dataset", None)
        evaluation = self._evaluation = self._start_evaluation(dataset, loss_only=loss_only)
        arguments = dataloader, description, prediction_loss_only, ignore_keys
        try:
            output = super().evaluation_loop(*arguments, metric_key_prefix=metric_key_prefix)
        finally:
            self._evaluation = None
        output.metrics.pop(f"{metric_key_prefix}_model_preparation_time", None)  # how long moving the model took
        means = evaluation.means.pop(self._reduce)
        means["num_tokens"] = self._num_tokens_so_far()  # as TRL: how far training has come
        output.metrics.update({f"{metric_key_prefix}_{key}": value for key, value in means.items()})
        return evaluation.with_predictions(output, self.compute_metrics, metric_key_prefix, self.args)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Metrics on `eval_dataset`, or on the trainer's own. Raw rows are tokenized first."""
        if isinstance(eval_dataset, Dataset | IterableDataset | list) and not self._is_prepared(eval_dataset):
            eval_dataset = self._prepared(eval_dataset, metric_key_prefix, self.model)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def predict(self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test") -> Any:
        """As in Trainer. Raw rows are tokenized first. The metrics are those of `evaluate`."""
        if not self._is_prepared(test_dataset):
            test_dataset = self._prepared(test_dataset, metric_key_prefix, self.model)
        return super().predict(test_dataset, ignore_keys, metric_key_prefix)

    @staticmethod
    def _is_prepared(dataset: Any) -> bool:
        is_ours = isinstance(dataset, Dataset | IterableDataset)
        return is_ours and {"prompt_ids", "responses"} <= set(dataset.column_names or ())

    # Checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the model as Trainer does, and the model card with it."""
        self._losses.settle(self)  # never save, log or evaluate after a step with a loss that is not finite
        super().save_model(output_dir, _internal_call)
        if not _internal_call:
            self.card.write(output_dir or self.args.output_dir)

    def save_state(self) -> None:
        """Saves the log and the state of the loop, as Trainer does."""
        if self.is_world_process_zero():
            self.state_writer.write(self.state, Path(self.args.output_dir, "trainer_state.json"))

    def create_model_card(self, *args: Any, **metadata: Any) -> None:
        """Writes README.md into the output directory. The arguments are those of `ModelCard.write`."""
        self.card.write(self.args.output_dir, *args, **metadata)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Saves as Trainer does. A model outside of a checkpoint replaces the one in its folder once it is whole.

        Raises:
            DiskFull: it does not fit. The model that was there is unchanged.
        """
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        if self._is_staging:
            self._write_model(folder, state_dict)
            if self.args.should_save:
                self.checksums.start(folder)
        else:
            replace = partial(self._replace_model, folder, state_dict)
            self.save_with_space(replace, "the model", folder, self._bytes_of_model)

    def _replace_model(self, folder: Path, state_dict: dict[str, Any] | None) -> None:
        self._write_model(folder / UNFINISHED, state_dict)
        if self.args.should_save:
            put_in_place(folder / UNFINISHED, folder)

    def _write_model(self, folder: Path, state_dict: dict[str, Any] | None) -> None:
        """Without the reference's adapter: it is not part of the trained model."""
        has_one = self.reference is not None and is_peft_model(self.model)
        if has_one and REFERENCE_ADAPTER in self.model.peft_config:
            state_dict = without_reference_weights(self.model.state_dict() if state_dict is None else state_dict)
        with without_reference_adapter(self.model) if has_one else nullcontext():
            super()._save(str(folder), state_dict)
        if self.args.should_save:
            self.saved.add_to(str(folder))

    def _bytes_of_model(self) -> int:
        return bytes_of_save(self.model, None, trained_only=is_peft_model(self.model))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._is_of_another_engine(resume_from_checkpoint):
            load_weights(resume_from_checkpoint, self.model if model is None else model, self)
        elif self._holds_parts() or not self.saved.load(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        for part in self.restored:
            part.load(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if self._holds_parts() or not self.saved.load(best):
            super()._load_best_model()
        for part in self.restored:  # its metrics were measured against the reference of that step
            part.load(best)

    def _holds_parts(self) -> bool:
        """Whether processes hold parts of the weights."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled or is_cut(self.model)
