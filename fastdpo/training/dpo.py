"""DPOTrainer: rows of preferences in, a trained policy out. It connects the steps below and contains no formula itself.

rows -> token columns (data) -> PackedBatch (collator) -> log-probs of policy (modeling, ops) and reference (references)
     -> PairScores -> loss (losses) and metrics
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from transformers.utils import logging

from fastdpo.data.prepare import Report, prepare_preference_dataset
from fastdpo.losses import LOSSES, is_listwise, looks_at_whole_batch, pair_scores, preference_losses
from fastdpo.metrics import metrics_of_tokens, pair_metrics, token_statistics
from fastdpo.modeling import packed_loss
from fastdpo.modeling.packed import summed_statistics
from fastdpo.modeling.packed_forward import LossOfSums
from fastdpo.modeling.prompt_once import logps_of_parts
from fastdpo.references import AdapterReference, DatasetReference, NoReference, Reference
from fastdpo.references.adapters import (
    brings_reference,
    copy_adapter_as_reference,
    starts_from_adapter,
)
from fastdpo.training.base import PackedTrainer
from fastdpo.training.callbacks.predictions import Predictions, pair_values
from fastdpo.training.callbacks.samples import EvalSamples
from fastdpo.training.callbacks.sync_reference import SyncReference
from fastdpo.training.callbacks.watch import TrainingWatch
from fastdpo.training.evaluation import Evaluation, StepResult
from fastdpo.training.inputs.before_weights import check_before_weights
from fastdpo.training.inputs.cached_reference import CachedReference
from fastdpo.training.inputs.streams import brings_ref_logps
from fastdpo.training.memory.row_parts import RowPart
from fastdpo.training.settings.config import DPOConfig
from fastdpo.training.settings.trl_names import check_methods, is_trls_config, settings_of, tokenizer_given_as
from fastdpo.training.setup.adapters import with_adapter
from fastdpo.training.setup.experts import with_load_balancing
from fastdpo.training.setup.models import model_name, resolve_model
from fastdpo.training.setup.reference import choose_reference, live_reference, too_large_to_hold
from fastdpo.training.setup.sharding import shard_reference, uses_fsdp2
from fastdpo.training.token_means import mean_length_of_batches, mean_length_of_dataset, reads_mean_length
from fastdpo.training.trl_attributes import with_trl_attributes
from fastdpo.types import PackedBatch

logger = logging.get_logger(__name__)

TOKEN_METRICS = ("entropy", "mean_logits", "is_top1")


@with_trl_attributes
class DPOTrainer(PackedTrainer):
    """Direct Preference Optimization of a causal LM.

    Args:
        model: the policy: a model, a PeftModel, or a name or path, which is loaded in fp32. For the path of a saved
            adapter, the base model is loaded and the adapter is trained further.
        ref_model: the reference; by default the policy before training.
        args: DPOConfig. From TRL's DPOConfig, the settings that differ from TRL's defaults are used.
        data_collator: replaces the packing collator; must return `PackedBatch.asdict()`.
        train_dataset, eval_dataset: `datasets.Dataset`, stream or list of dicts in any form that fastdpo reads, or
            already tokenized; eval_dataset may be a dict of them.
        processing_class: the tokenizer, or a processor with one; by default the one saved with the model.
        compute_metrics: gets log-probs and rewards of every pair, and no logits; see `callbacks/predictions.py`.
        callbacks, optimizers: as in transformers.Trainer.
        quantization_config: quantizes a model that is given by name (BitsAndBytesConfig); needs peft_config.
        peft_config: adds a new adapter to the model. The model without the adapter is the reference.
    Raises:
        ValueError: the arguments cannot work together. No weight has changed by then.
    """

    method = "dpo"
    args: DPOConfig
    reference: Reference
    eval_samples: EvalSamples | None = None  # answers of policy and reference at each evaluation
    watch: TrainingWatch | None = None  # the warnings of this run
    _cached: CachedReference | None = None  # computes log-probs for datasets that are passed later

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_methods(cls)

    def __init__(
        self,
        model: str | nn.Module,
        ref_model: str | nn.Module | None = None,
        args: DPOConfig | None = None,
        data_collator: Callable[..., dict[str, Any]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_metrics: Callable[[Any], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        **renamed: Any,
    ) -> None:
        args = _as_config(args, model)
        if renamed:
            processing_class = tokenizer_given_as(renamed, processing_class, DPOConfig)
        if ref_model is model and ref_model is not None and not isinstance(model, str):
            raise ValueError(
                "ref_model must not be the same object as model; leave it out to use a copy of the model as reference"
            )
        check_before_weights(args, train_dataset, eval_dataset, is_sft=False)
        policy, tokenizer = resolve_model(model, processing_class, args, quantization_config)
        policy = with_adapter(policy, peft_config, args, trains=train_dataset is not None)
        super().__init__(
            policy,
            args,
            data_collator,
            train_dataset,
            eval_dataset,
            tokenizer,
            processing_class if isinstance(processing_class, ProcessorMixin) else None,
            callbacks,
            compute_metrics=compute_metrics,
            optimizers=optimizers,
        )
        mode, self.reference_reason = choose_reference(
            args,
            policy,
            ref_model,
            self._has_ref_logps(),
            too_large=too_large_to_hold(args, policy, ref_model),
        )
        self.reference = self._make_reference(mode, ref_model)
        self._add_callbacks()

    def _add_callbacks(self) -> None:
        """Adds the callbacks that the settings turn on.

        Raises:
            ValueError: a setting cannot work with the model, data or reference.
        """
        args, is_sharded = self.args, self._holds_parts()
        if self.compute_metrics is not None and args.include_for_metrics:
            raise ValueError(
                f"include_for_metrics must be empty, got {args.include_for_metrics}: compute_metrics gets log-probs and"
                " rewards of every pair, and no inputs"
            )
        if args.sync_ref_model:
            synced = SyncReference(self.reference, self.model, is_sharded=is_sharded)
            self.add_callback(synced)
            self.restored.append(synced)
            self.reference_reason += f"; it moves towards the policy every {args.ref_model_sync_steps} steps"
        if args.training_warnings:
            has_reference = self.reference.mode != "none"
            means, given = self.train_means.peek, self.warnings_given
            self.watch = TrainingWatch(has_reference=has_reference, first_means=means, given=given)
            self.add_callback(self.watch)
            self.parts["watch"] = self.watch
        if args.num_eval_samples:
            self.eval_samples = EvalSamples(
                args,
                lambda: self.model,
                self.reference,
                self.processing_class,
                self.eval_dataset,
                autocast=self.accelerator.autocast,
                callbacks=self.callback_handler.callbacks,
                watch=self.watch,
                is_sharded=is_sharded,
            )
            self.add_callback(self.eval_samples)
            self.parts["samples"] = self.eval_samples

    # The reference

    def _datasets(self) -> dict[str, Dataset]:
        """The datasets of the run, by "train", "eval" or "eval_<name>"."""
        eval_dataset: Any = self.eval_dataset
        evaluated = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
        named = {f"eval_{name}".removesuffix("_"): dataset for name, dataset in evaluated.items()}
        return {n: dataset for n, dataset in {"train": self.train_dataset, **named}.items() if dataset is not None}

    def _has_ref_logps(self) -> bool:
        """Whether every row of the run's datasets has reference log-probs."""
        datasets = self._datasets().values()
        return bool(datasets) and all(map(brings_ref_logps, datasets))

    def _make_reference(self, mode: str, ref_model: str | nn.Module | None) -> Reference:
        if mode == "none":
            return NoReference()
        if mode == "cached":
            if not self._has_ref_logps():
                self._cache_reference(ref_model)
            return DatasetReference()
        if mode == "adapter":
            moves = starts_from_adapter(self.model) or self.args.sync_ref_model
            if moves and not brings_reference(self.model):
                copy_adapter_as_reference(self.model)
            return AdapterReference(self.model, impl=self.args.impl)
        will_be_sharded = uses_fsdp2(self.accelerator)
        reference = live_reference(
            self.args, self.model, ref_model, self.processing_class, will_be_sharded=will_be_sharded
        )
        if ref_model is not None:
            self._check_packing(reference.model)
        reference.model = shard_reference(reference.model, self.accelerator)
        return reference

    def _cache_reference(self, ref_model: str | nn.Module | None) -> None:
        """Adds the reference log-probs to the rows of all datasets, and frees the reference."""
        cached = CachedReference(self.args, lambda: self.model, ref_model, self.processing_class)
        filled, done = cached.fill(self._datasets(), self._runs_packed)
        self.train_dataset: Any = filled.get("train")
        eval_dataset: Any = self.eval_dataset
        if isinstance(eval_dataset, dict):
            self.eval_dataset: Any = {name: filled[f"eval_{name}"] for name in eval_dataset}
        else:
            self.eval_dataset = filled.get("eval")
        self.reference_reason += f"; {done}"
        self._cached = cached
        self.add_callback(cached)

    def _runs_packed(self, model: nn.Module) -> bool:
        if model is not self.model:
            self._check_packing(model)
        return self.is_packed

    def _prepared(self, dataset: Any, name: str, model: nn.Module) -> Any:
        """As in PackedTrainer. If the reference is cached, later datasets get its log-probs too."""
        prepared = super()._prepared(dataset, name, model)
        return prepared if prepared is None or self._cached is None else self._cached.fill_late(prepared, name)

    # The loss

    def _prepare_dataset(self, dataset: Any) -> tuple[Any, Report]:
        return prepare_preference_dataset(
            dataset, self.processing_class, self.args.tokenization_settings(), num_proc=self.args.dataset_num_proc
        )

    def _num_items(self, inputs: dict[str, Any]) -> int:
        """The number of pairs, or of rankings for a listwise loss."""
        pairs = inputs["pairs"]
        if is_listwise(self.args):
            return len(_rankings(inputs["example_ids"], pairs).unique_consecutive())
        return len(pairs)

    def _why_whole(self) -> str:
        if looks_at_whole_batch(self.args):
            return f"loss_type {self.args.loss_type} is not a sum over pairs"
        return super()._why_whole()

    def _first_rows(self, inputs: dict[str, Any], num_rows: int) -> dict[str, Any]:
        is_kept = inputs["example_ids"][inputs["pairs"][:, 0]] < num_rows
        of_pairs = [name for name in ("pairs", "shared_parts") if inputs.get(name) is not None]
        return {**inputs, **{name: inputs[name][is_kept] for name in of_pairs}}

    def _tell_step(self, parts: list[dict[str, Any]], reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        if not reads_mean_length(self.args):
            return
        mean = None if self._evaluation is None else self._evaluation.mean_chosen_length
        if mean is None:
            mean = mean_length_of_batches(parts, self.args.device, reduce)
        for part in parts:
            part["mean_chosen_length"] = mean

    def _start_evaluation(self, dataset: Any, *, loss_only: bool) -> Evaluation:
        """An Evaluation with the dataset's mean length. For a stream, each batch uses its own mean length."""
        mean = None
        if reads_mean_length(self.args) and isinstance(dataset, Dataset):
            mean = torch.tensor(mean_length_of_dataset(dataset), dtype=torch.float32, device=self.args.device)
        return Evaluation(mean, None if loss_only else Predictions())

    def _loss_sum(self, model: nn.Module, batch: PackedBatch) -> StepResult:
        args = self.args
        if args.ld_alpha is not None and batch.shared_parts is None:
            raise ValueError(
                "data_collator must return shared_parts if ld_alpha is set, as PackingCollator(shared_parts=True) does,"
                " got None"
            )
        ref_sums = self.reference.sums(model, batch)  # first, because the policy's head needs the weight of each pair
        settings = self._head_settings() | {"outputs": self._statistics(), "summed": self._summed()}
        router_aux_loss = self.router_aux_loss_coef > 0
        loss_of = self._loss_of_sums(batch, ref_sums)
        loss, policy = packed_loss(model, batch, loss_of, **settings, router_aux_loss=router_aux_loss)
        found = policy.sequences
        statistics = token_statistics(found.tokens, batch.token_rows, batch.cu_seqlens, impl=args.impl)
        result = self._result(batch, loss, found.sums.detach(), found.lengths, ref_sums, statistics)
        if policy.aux_loss is None:
            return result
        num_items = self._num_items({"pairs": batch.pairs, "example_ids": batch.example_ids})
        loss, balance = with_load_balancing(loss, policy.aux_loss, self.router_aux_loss_coef, num_items)
        return replace(result, loss=loss, metrics={**result.metrics, **balance})

    def _loss_of_row(
        self, model: nn.Module, batch: PackedBatch, parts: Sequence[RowPart], num_prompt: int
    ) -> tuple[StepResult, Tensor]:
        found: list[dict[str, Tensor]] = []
        batches = [PackedBatch(**part.inputs) for part in parts]
        of_reference = self.reference.sums_of_parts(model, batches, num_prompt)
        of_policy = logps_of_parts(model, batches, num_prompt, impl=self.args.impl, outputs=self._statistics())
        for own, ref_sums, logps in zip(batches, of_reference, of_policy, strict=True):
            sequences = logps.sequences
            statistics = token_statistics(sequences.tokens, own.token_rows, own.cu_seqlens, impl=self.args.impl)
            summed = summed_statistics(sequences.tokens, self._summed(), own, impl=self.args.impl)
            numbers = {"sums": sequences.sums, "lengths": sequences.lengths, "ref_sums": ref_sums}
            found.append({**numbers, **statistics, **summed})
        place = torch.tensor([i for part in parts for i in part.sequences], device=batch.pairs.device)
        whole = {name: torch.cat([numbers[name] for numbers in found])[place.argsort()] for name in found[0]}
        sums, lengths, ref_sums = (whole.pop(name) for name in ("sums", "lengths", "ref_sums"))
        summed = {name: whole.pop(name) for name in self._summed()}
        with torch.enable_grad():
            leaf = sums.detach().requires_grad_()
            everything = (slice(0, batch.num_sequences), slice(0, batch.num_pairs))
            loss = self._loss_of_sums(batch, ref_sums)(leaf, lengths, *everything, **summed)
            (weights,) = torch.autograd.grad(loss, leaf, allow_unused=True, materialize_grads=True)
        return self._result(batch, loss.detach(), sums, lengths, ref_sums, whole), weights

    def _head_settings(self) -> dict[str, Any]:
        in_forward = not self.args.torch_compile and not looks_at_whole_batch(self.args)
        return {"impl": self.args.impl, "grad_in_forward": in_forward}

    def _summed(self) -> tuple[str, ...]:
        """Statistics of tokens whose sums the loss reads."""
        return ("log_sum_sq_probs",) if self.args.use_weighting else ()

    def _statistics(self) -> tuple[str, ...]:
        """Statistics of tokens that metrics or the loss read."""
        return (*(TOKEN_METRICS if self.args.token_metrics else ()), *self._summed())

    def _loss_of_sums(self, batch: PackedBatch, ref_sums: Tensor) -> LossOfSums:
        """The loss of consecutive groups of the batch from their log-probs, as `packed_loss` calls it."""
        args = self.args
        rankings = _rankings(batch.example_ids, batch.pairs) if is_listwise(args) else None

        def loss_of(sums: Tensor, lengths: Tensor, sequences: slice, pairs: slice, **statistics: Tensor) -> Tensor:
            scores = pair_scores(
                batch.pairs[pairs] - sequences.start,
                sums,
                lengths,
                ref_sums[sequences],
                args,
                shared_parts=None if batch.shared_parts is None else batch.shared_parts[pairs] - sequences.start,
                rankings=None if rankings is None else rankings[pairs],
                mean_chosen_length=batch.mean_chosen_length,
                **statistics,
            )
            return preference_losses(scores, args).sum()

        return loss_of

    def _result(
        self,
        batch: PackedBatch,
        loss: Tensor,
        sums: Tensor,  # (S,) of the policy, without graph
        lengths: Tensor,
        ref_sums: Tensor,
        statistics: dict[str, Tensor],  # as from `token_statistics`
    ) -> StepResult:
        """The loss with its metrics, and what predictions and a saved bad batch need."""
        args = self.args
        scores = pair_scores(batch.pairs, sums, lengths, ref_sums, args, shared_parts=batch.shared_parts)
        per_token = any(LOSSES[name].rewards_per_token for name in args.loss_type)
        metrics = pair_metrics(scores, args.beta, per_token=per_token)
        metrics.update(metrics_of_tokens(statistics, batch.pairs))
        is_asked = self._evaluation is not None and self._evaluation.predictions is not None
        values = pair_values(scores, batch, args.beta, per_token=per_token) if is_asked else None
        return StepResult(loss, metrics, values, {"policy": sums, "reference": ref_sums.detach()})


def _rankings(example_ids: Tensor | None, pairs: Tensor) -> Tensor:
    """(B,) number of the ranking that each of the (B, 2) pairs belongs to. Every example of the batch is one ranking.

    Raises:
        ValueError: the collator does not return example_ids.
    """
    if example_ids is None:
        raise ValueError("data_collator must return example_ids for a listwise loss, got None")
    return example_ids[pairs[:, 0]]


def _as_config(args: Any, model: Any) -> DPOConfig:
    """The settings as DPOConfig: `args` itself, converted from TRL's DPOConfig, or the defaults for None.

    Raises:
        ValueError: `args` is something else.
    """
    if args is None:
        return DPOConfig(f"{model_name(model).rstrip('/').split('/')[-1]}-DPO")
    if isinstance(args, DPOConfig):
        return args
    if is_trls_config(args):
        logger.warning("args is TRL's DPOConfig: fastdpo uses the settings in it that differ from TRL's defaults.")
        return DPOConfig(**settings_of(args))
    raise ValueError(
        f"args must be a DPOConfig, got {type(args).__name__}; write args=fastdpo.DPOConfig(...), which has all"
        " settings of TrainingArguments"
    )
