"""DPOTrainer: rows of preferences in, a trained policy out. It strings the flow's steps together and holds no formula
of its own.

rows -> token columns (data) -> PackedBatch (collator) -> log-probs of policy (modeling, ops) and reference (references)
     -> PairScores -> loss (losses) and metrics
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from transformers.utils import logging

from fastdpo.data.prepare import Report, prepare_preference_dataset
from fastdpo.losses import LOSSES, is_listwise, looks_at_whole_batch, pair_scores, preference_losses
from fastdpo.losses.batch import rankings_of
from fastdpo.losses.scores import SHARED_PARTS_AFTER
from fastdpo.metrics import SumAndWeight, pair_metrics, token_metrics
from fastdpo.modeling import packed_loss
from fastdpo.references import AdapterReference, DatasetReference, NoReference, Reference
from fastdpo.references.adapters import (
    REFERENCE_ADAPTER,
    brings_reference,
    copy_adapter_as_reference,
    is_peft_model,
    starts_from_adapter,
    without_reference_adapter,
    without_reference_weights,
)
from fastdpo.references.cache import LogpsCache
from fastdpo.references.precompute import Scorer, fill_ref_logps, lacks_ref_logps
from fastdpo.training.callbacks.predictions import pair_values
from fastdpo.training.features import FeaturedTrainer
from fastdpo.training.inputs.before_weights import check_before_weights
from fastdpo.training.inputs.streams import brings_ref_logps, check_not_streamed
from fastdpo.training.settings.config import DPOConfig
from fastdpo.training.settings.trl_names import check_methods, is_trls_config, settings_of, tokenizer_given_as
from fastdpo.training.setup.adapters import with_adapter
from fastdpo.training.setup.experts import with_load_balancing
from fastdpo.training.setup.models import model_name, resolve_model
from fastdpo.training.setup.reference import (
    AskedOnce,
    asked_once,
    choose_reference,
    give_memory_back,
    live_reference,
    too_large_to_hold,
)
from fastdpo.training.token_means import TokenMeans
from fastdpo.training.trl_attributes import TRLAttributes
from fastdpo.types import PackedBatch

logger = logging.get_logger(__name__)

TOKEN_METRICS = ("entropy", "mean_logits", "is_top1")


class DPOTrainer(TRLAttributes, TokenMeans, FeaturedTrainer):
    """Direct Preference Optimization of a causal LM.

    Args:
        model: the policy, as a model, a PeftModel, or a name or path that is loaded in fp32; the path of a saved
            adapter loads its base model and goes on with the adapter.
        ref_model: the reference; by default the policy's own start.
        args: DPOConfig; TRL's is taken over as far as it differs from its defaults.
        data_collator: in place of the packing collator; must return `PackedBatch.asdict()`.
        train_dataset, eval_dataset: `datasets.Dataset`, stream or list of dicts in any form that fastdpo reads, or
            already tokenized; eval_dataset may be a dict of them.
        processing_class: the tokenizer, or a processor with one; by default the one saved with the model.
        compute_metrics: gets numbers of every pair and no logits, see `callbacks/predictions.py`.
        callbacks, optimizers: as in transformers.Trainer.
        quantization_config: how a model given by name is quantized (BitsAndBytesConfig); needs peft_config.
        peft_config: puts a new adapter on the model; the model as it was before is the reference.
    Raises:
        ValueError: arguments that cannot work together, before any weight is changed.
    """

    args: DPOConfig
    _cache: LogpsCache | None = None  # of a reference that has been asked once, for datasets that come later
    _asked: AskedOnce | None = None  # that reference, where it is the policy itself
    _ref_model: str | nn.Module | None = None  # that reference, where it was given; a model is held until training

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
                "ref_model must not be the model that is trained; leave it out to compare with a copy of its start"
            )
        check_before_weights(args, train_dataset, eval_dataset, is_sft=False)
        policy, tokenizer = resolve_model(model, processing_class, args, quantization_config)
        self.processor = processing_class if isinstance(processing_class, ProcessorMixin) else None
        policy = with_adapter(policy, peft_config, args, trains=train_dataset is not None)
        super().__init__(
            policy,
            args,
            data_collator,
            train_dataset,
            eval_dataset,
            tokenizer,
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
        self.add_features()

    def _datasets(self) -> dict[str, Dataset]:
        """What the run will see, by "train", "eval" or "eval_<name>"."""
        eval_dataset: Any = self.eval_dataset
        evaluated = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
        named = {f"eval_{name}".removesuffix("_"): dataset for name, dataset in evaluated.items()}
        return {n: dataset for n, dataset in {"train": self.train_dataset, **named}.items() if dataset is not None}

    def _has_ref_logps(self) -> bool:
        """Whether every row that the run will see brings reference log-probs."""
        datasets = self._datasets().values()
        return bool(datasets) and all(map(brings_ref_logps, datasets))

    def _make_reference(self, mode: str, ref_model: str | nn.Module | None) -> Reference:
        if mode == "none":
            return NoReference()
        if mode == "cached":
            if not self._has_ref_logps():
                check_not_streamed(self._datasets(), self.args)
                self._cache_reference(ref_model)
                give_memory_back()
            return DatasetReference()
        if mode == "adapter":
            moves = starts_from_adapter(self.model) or self.args.sync_ref_model
            if moves and not brings_reference(self.model):
                copy_adapter_as_reference(self.model)
            return AdapterReference(self.model, impl=self.args.impl)
        reference = live_reference(self.args, self.model, ref_model, self.processing_class)
        if ref_model is not None:
            self._check_packing(reference.model)
        return reference

    def _cache_reference(self, ref_model: str | nn.Module | None) -> None:
        """Fills the rows of all datasets, and frees the reference."""
        with asked_once(self.args, self.model, ref_model, self.processing_class) as asked:
            if ref_model is not None:
                self._check_packing(asked.model)
            cache = asked.cache(self.args)
            scorer = asked.scorer(self.args, is_packed=self.is_packed, tokenizer=self.processing_class)
            filled, counts = {}, []
            for name, dataset in self._datasets().items():
                filled[name], count = fill_ref_logps(dataset, cache, scorer, name=name)
                counts.append(f"{name} {count}")
        self.train_dataset: Any = filled.get("train")
        eval_dataset: Any = self.eval_dataset
        if isinstance(eval_dataset, dict):
            self.eval_dataset: Any = {name: filled[f"eval_{name}"] for name in eval_dataset}
        else:
            self.eval_dataset = filled.get("eval")
        self.reference_reason += f"; {'; '.join(counts)}; in {cache.folder}"
        self._cache, self._ref_model = cache, ref_model
        self._asked = asked if ref_model is None else None

    def _prepared(self, dataset: Any, name: str, model: nn.Module) -> Any:
        """As in PackedTrainer; a dataset that comes after the reference was cached gets its log-probs too."""
        prepared = super()._prepared(dataset, name, model)
        if prepared is None or self._cache is None:
            return prepared
        check_not_streamed({name: prepared}, self.args)
        with self._asked_again(prepared, self._cache) as scorer:
            return fill_ref_logps(prepared, self._cache, scorer, name=name)[0]

    @contextmanager
    def _asked_again(self, dataset: Dataset, cache: LogpsCache) -> Iterator[Scorer | None]:
        """How rows that came after the reference was cached are scored; None where nothing is missing, or where it is
        gone: a policy of which all weights are trained is its own reference until the first step."""
        own = self._asked
        if own is not None and not isinstance(own.reference, AdapterReference) and self.state.global_step > 0:
            own = None
        if (own is None and self._ref_model is None) or not lacks_ref_logps(dataset, cache):
            yield None
            return
        asked_again = asked_once(self.args, self.model, self._ref_model, self.processing_class)
        with asked_again if own is None else nullcontext(own) as asked:
            scorer = asked.scorer(self.args, is_packed=self.is_packed, tokenizer=self.processing_class)
            yield scorer if asked.cache(self.args).key == cache.key else None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in PackedTrainer; a reference that was cached is not held beside the policy."""
        if isinstance(self._ref_model, nn.Module):
            self._ref_model = None
        return super().train(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Trainer's, without the reference's adapter: it is where training started, and no part of what came out."""
        if is_peft_model(self.model) and REFERENCE_ADAPTER in self.model.peft_config:
            state_dict = without_reference_weights(self.model.state_dict() if state_dict is None else state_dict)
        with without_reference_adapter(self.model):
            super()._save(output_dir, state_dict)

    def _prepare_dataset(self, dataset: Any) -> tuple[Any, Report]:
        return prepare_preference_dataset(
            dataset, self.processing_class, self.args.tokenization_settings(), num_proc=self.args.dataset_num_proc
        )

    def _num_items(self, inputs: dict[str, Any]) -> int:
        """Pairs, or rankings where the loss is one of rankings."""
        pairs = inputs["pairs"]
        if is_listwise(self.args) and len(pairs):
            return int(rankings_of(pairs)[-1]) + 1
        return len(pairs)

    def _first_rows(self, inputs: dict[str, Any], num_rows: int) -> dict[str, Any]:
        pairs = inputs["pairs"]
        return {**inputs, "pairs": pairs[inputs["example_ids"][pairs[:, 0]] < num_rows]}

    def _loss_sum(self, model: nn.Module, batch: PackedBatch) -> tuple[Tensor, dict[str, SumAndWeight]]:
        args = self.args
        if args.ld_alpha is not None and batch.num_sequences < 2 * SHARED_PARTS_AFTER * batch.num_pairs:
            raise ValueError(
                "ld_alpha needs rows made for it: these lack the parts up to the length that a pair shares"
            )
        ref_sums = self.reference.sums(model, batch)  # first: then the policy's head knows the weight of each pair

        def loss_of(sums: Tensor, lengths: Tensor, sequences: slice, pairs: slice, **statistics: Tensor) -> Tensor:
            scores = pair_scores(
                batch.pairs[pairs] - sequences.start,
                sums,
                lengths,
                ref_sums[sequences],
                args,
                mean_chosen_length=self.mean_chosen_length,
                **statistics,
            )
            return preference_losses(scores, args).sum()

        summed = ("log_sum_sq_probs",) if args.use_weighting else ()
        settings: dict[str, Any] = {
            "impl": args.impl,
            "outputs": (*(TOKEN_METRICS if args.token_metrics else ()), *summed),
            "summed": summed,
            "grad_in_forward": not args.torch_compile and not looks_at_whole_batch(args),
            "router_aux_loss": self.router_aux_loss_coef > 0,
        }
        loss, policy = packed_loss(model, batch, loss_of, **settings)
        found = policy.sequences
        scores = pair_scores(batch.pairs, found.sums.detach(), found.lengths, ref_sums, args)
        per_token = any(LOSSES[name].rewards_per_token for name in args.loss_type)
        metrics = pair_metrics(scores, args.beta, per_token=per_token)
        metrics.update(token_metrics(policy, batch.token_rows, batch.cu_seqlens, batch.pairs, impl=args.impl))
        if policy.aux_loss is not None:
            num_items = self._num_items({"pairs": batch.pairs})
            loss, balance = with_load_balancing(loss, policy.aux_loss, self.router_aux_loss_coef, num_items)
            metrics.update(balance)
        if self._predictions is not None:
            self._pair_values = pair_values(scores, batch, args.beta, per_token=per_token)
        return loss, metrics


def _as_config(args: Any, model: Any) -> DPOConfig:
    """The settings as DPOConfig: those given, TRL's taken over, or the defaults.

    Raises:
        ValueError: neither of them.
    """
    if args is None:
        return DPOConfig(f"{model_name(model).rstrip('/').split('/')[-1]}-DPO")
    if isinstance(args, DPOConfig):
        return args
    if is_trls_config(args):
        logger.warning("args is TRL's DPOConfig: what differs from its defaults is taken over into fastdpo's.")
        return DPOConfig(**settings_of(args))
    raise ValueError(
        f"args must be a DPOConfig, got {type(args).__name__}; write args=fastdpo.DPOConfig(...), which has all that"
        " TrainingArguments has"
    )
