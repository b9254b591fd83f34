"""DPOTrainer: rows of preferences in, a trained policy out. It strings the flow's steps together and holds no formula
of its own.

rows -> token columns (data) -> PackedBatch (collator) -> log-probs of policy (modeling, ops) and reference (references)
     -> PairScores -> loss (losses) and metrics
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, set_seed

from fastdpo.data.prepare import DataReport, prepare_preference_dataset
from fastdpo.losses import LOSSES
from fastdpo.metrics import SumAndWeight, pair_metrics, token_metrics
from fastdpo.modeling import packed_loss, prepare_model
from fastdpo.modeling.packed import bare_model
from fastdpo.references import AdapterReference, DatasetReference, FrozenReference, NoReference, Reference
from fastdpo.references.references import copy_adapter_as_reference
from fastdpo.training.base import PackedTrainer
from fastdpo.training.config import DPOConfig
from fastdpo.training.models import check_model_and_tokenizer, load_model, resolve_model
from fastdpo.types import PackedBatch, PairScores

TOKEN_METRICS = ("entropy", "mean_logits", "is_top1")


class DPOTrainer(PackedTrainer):
    """Direct Preference Optimization of a causal LM.

    Args:
        model: the policy, as a model, a PeftModel, or a name or path that is loaded in fp32.
        ref_model: the reference; by default the policy's own start.
        args: DPOConfig.
        data_collator: in place of the packing collator; must return `PackedBatch.asdict()`.
        train_dataset, eval_dataset: `datasets.Dataset` or list of dicts in any form that fastdpo reads, or already
            tokenized; eval_dataset may be a dict of them.
        processing_class: the tokenizer; by default the one saved with the model.
        callbacks, optimizers: as in transformers.Trainer.
        quantization_config: how a model given by name is quantized (BitsAndBytesConfig); needs peft_config.
        peft_config: puts a new adapter on the model; the model without it is the reference.
    Raises:
        ValueError: arguments that cannot work together, before any weight is changed.
    """

    args: DPOConfig

    def __init__(
        self,
        model: str | nn.Module,
        ref_model: str | nn.Module | None = None,
        args: DPOConfig | None = None,
        data_collator: Callable[..., dict[str, Any]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
    ) -> None:
        args = args if args is not None else DPOConfig("dpo_output")
        if not isinstance(args, DPOConfig):
            raise ValueError(f"args must be a DPOConfig, got {type(args).__name__}")
        if ref_model is model and ref_model is not None and not isinstance(model, str):
            raise ValueError(
                "ref_model must not be the model that is trained; leave it out to compare with a copy of its start"
            )
        policy, tokenizer = resolve_model(model, processing_class, args.model_init_kwargs, quantization_config)
        if peft_config is not None:
            policy = _with_adapter(policy, peft_config, args)
        super().__init__(
            policy,
            args,
            data_collator,
            train_dataset,
            eval_dataset,
            tokenizer,
            callbacks,
            optimizers=optimizers,
        )
        mode, self.reference_reason = choose_reference(
            args, policy, ref_model, self._has_ref_logps(), is_new_adapter=peft_config is not None
        )
        self.reference = self._make_reference(mode, ref_model)

    def _has_ref_logps(self) -> bool:
        """Whether every row that the run will see brings reference log-probs."""
        evaluated = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        datasets = [dataset for dataset in (self.train_dataset, *evaluated) if dataset is not None]
        return bool(datasets) and all(None not in dataset["ref_logps"] for dataset in datasets)

    def _make_reference(self, mode: str, ref_model: str | nn.Module | None) -> Reference:
        if mode == "none":
            return NoReference()
        if mode == "cached":
            return DatasetReference()
        if mode == "adapter":
            if self._starts_from_adapter(self.model):
                copy_adapter_as_reference(self.model)
            return AdapterReference(self.model, impl=self.args.impl)
        if ref_model is None:
            frozen = copy.deepcopy(self.model)
        else:
            frozen = load_model(ref_model) if isinstance(ref_model, str) else ref_model
            check_model_and_tokenizer(frozen, self.processing_class)
            _check_beside_policy(frozen, self.model)
        prepare_model(frozen).requires_grad_(False)
        if getattr(frozen, "hf_device_map", None) is None and not getattr(frozen, "is_quantized", False):
            frozen.to(self.args.device)
        if ref_model is not None:
            self._check_packing(frozen)
        return FrozenReference(frozen.eval(), impl=self.args.impl)

    @staticmethod
    def _starts_from_adapter(peft_model: nn.Module) -> bool:
        """Whether the active adapter does something: a new LoRA's B is zero, and the model without it is the start."""
        active = [
            p
            for name, p in peft_model.named_parameters()
            if f".{peft_model.active_adapter}." in name and "lora_B" in name
        ]
        return not active or any(bool(p.any()) for p in active)

    def _prepare_dataset(self, dataset: Any) -> tuple[Any, DataReport]:
        return prepare_preference_dataset(
            dataset, self.processing_class, self.args.tokenization_settings(), num_proc=self.args.dataset_num_proc
        )

    def _num_items(self, inputs: dict[str, Any]) -> int:
        return inputs["pairs"].shape[0]

    def _first_rows(self, inputs: dict[str, Any], num_rows: int) -> dict[str, Any]:
        return {**inputs, "pairs": inputs["pairs"][:num_rows]}  # one pair a row

    def _loss_sum(self, model: nn.Module, batch: PackedBatch) -> tuple[Tensor, dict[str, SumAndWeight]]:
        reference = self.reference.logps(model, batch)  # first: then the policy's head knows the weight of each pair

        def scores_of(sums: Tensor, lengths: Tensor, first: int, pairs: slice) -> PairScores:
            """Scores of some pairs, from the sequences that start with number `first`."""
            chosen, rejected = (batch.pairs[pairs] - first).unbind(1)
            ref_chosen_logps, ref_rejected_logps = (logps[pairs] for logps in reference)
            return PairScores(
                policy_chosen_logps=sums[chosen],
                policy_rejected_logps=sums[rejected],
                ref_chosen_logps=ref_chosen_logps,
                ref_rejected_logps=ref_rejected_logps,
                chosen_lengths=lengths[chosen],
                rejected_lengths=lengths[rejected],
            )

        def loss_of(sums: Tensor, lengths: Tensor, sequences: slice, pairs: slice) -> Tensor:
            scores = scores_of(sums, lengths, sequences.start, pairs)
            return LOSSES[self.args.loss_type](scores, self.args).sum()

        outputs = TOKEN_METRICS if self.args.token_metrics else ()
        settings: dict[str, Any] = {"impl": self.args.impl, "outputs": outputs}
        loss, policy = packed_loss(model, batch, loss_of, grad_in_forward=not self.args.torch_compile, **settings)
        scores = scores_of(policy.sequences.sums.detach(), policy.sequences.lengths, 0, slice(None))
        metrics = pair_metrics(scores, self.args.beta)
        metrics.update(token_metrics(policy, batch.token_rows, batch.cu_seqlens, batch.pairs))
        return loss, metrics


def choose_reference(
    args: DPOConfig, model: nn.Module, ref_model: Any, has_ref_logps: bool, *, is_new_adapter: bool
) -> tuple[str, str]:
    """The reference mode and the reason for it.

    Args:
        has_ref_logps: every row of the training and evaluation data brings reference log-probs.
        is_new_adapter: the adapter was put on by this run.
    Raises:
        ValueError: the mode that was asked for cannot work with the model or the dataset.
    """
    has_adapter = hasattr(model, "peft_config") and hasattr(model, "disable_adapter")
    outside = _trained_outside_adapter(model) if has_adapter else None
    mode = "none" if args.reference_free else args.reference
    if mode == "none" and ref_model is not None:
        raise ValueError("ref_model must be None where there is no reference (reference='none' or reference_free)")
    if mode == "adapter" and (not has_adapter or ref_model is not None or outside):
        why = f"{outside} is trained too" if outside else "ref_model is given" if has_adapter else "there is no adapter"
        raise ValueError(f"reference must not be 'adapter' here: {why}")
    if mode == "cached" and not has_ref_logps:
        raise ValueError(
            "reference 'cached' needs ref_chosen_logps and ref_rejected_logps in every row, also of eval_dataset"
        )
    if mode != "auto":
        return mode, "asked for"
    if ref_model is not None:
        return "frozen", "ref_model was given"
    if has_ref_logps:
        return "cached", "the dataset brings ref_chosen_logps and ref_rejected_logps"
    if outside:
        return "frozen", f"{outside} is trained beside the adapter, so the reference is a copy of the start"
    if has_adapter:
        start = "the model without its adapter" if is_new_adapter else "the model as its adapter starts"
        return "adapter", f"{start} is the reference, which needs no second model"
    return "frozen", "all weights are trained, so the reference is a copy of the start"


def _trained_outside_adapter(model: Any) -> str | None:
    """A trained weight that stays when the adapter is off, such as a bias under LoRA's bias='all'."""
    adapters = {f".{name}" for name in model.peft_config}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not any(f"{adapter}." in f"{name}." for adapter in adapters):
            return name
    return None


def _check_beside_policy(reference: nn.Module, policy: nn.Module) -> None:
    """A given reference must be another model over the same vocabulary.

    Raises:
        ValueError: it shares weights with the policy, or has another vocabulary.
    """
    trained = {p.data_ptr() for p in policy.parameters()}
    if any(p.data_ptr() in trained for p in reference.parameters()):
        raise ValueError("ref_model must not share weights with the model that is trained; give it a copy")
    num_tokens = [bare_model(m).get_output_embeddings().weight.shape[0] for m in (policy, reference)]
    if num_tokens[0] != num_tokens[1]:
        raise ValueError(f"ref_model must have the policy's vocabulary of {num_tokens[0]} logits, got {num_tokens[1]}")


def _with_adapter(model: Any, peft_config: Any, args: DPOConfig) -> Any:
    try:
        from peft import PeftConfig, PeftModel, get_peft_model
    except ImportError as error:
        raise ValueError('peft_config needs the peft package: pip install "fastdpo[peft]"') from error
    if not isinstance(peft_config, PeftConfig):
        raise ValueError(f"peft_config must be a peft.PeftConfig such as LoraConfig, got {type(peft_config).__name__}")
    if isinstance(model, PeftModel):
        raise ValueError(
            "peft_config must be None where model already is a PeftModel; merge and unload its adapter first"
        )
    if peft_config.is_prompt_learning:
        raise ValueError(
            f"peft_config must not be {peft_config.peft_type.value}: virtual prompt tokens have no place in a"
            " packed row; use LoRA"
        )
    set_seed(args.seed)  # adapters start from random weights
    model = get_peft_model(model, peft_config)
    if args.gradient_checkpointing:
        model.enable_input_require_grads()
    return model
