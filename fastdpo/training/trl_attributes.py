"""Attributes of TRL's DPOTrainer that scripts and callbacks read, with the same meaning on fastdpo's DPOTrainer.

In: a built trainer. Out: its loss settings, reference model and tags under TRL's names. Assigning an attribute such as
`trainer.beta` changes `args`, which the loss reads. Attributes of TRL (1.16 and before) without a meaning here raise
an AttributeError that says what to read instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from fastdpo.losses import is_listwise
from fastdpo.references import FrozenReference, Reference
from fastdpo.references.adapters import REFERENCE_ADAPTER, is_peft_model

T = TypeVar("T")

# TRL's attributes without a meaning here, and what to read instead.
INSTEAD: Mapping[str, str] = {
    "compute_ref_log_probs": "trainer.reference.sums(model, batch), the summed log-probs of a packed batch",
    "maybe_activation_offload_context": "args.activation_checkpointing_kwargs: 'offload' moves activations to the host",
    # of releases before 1.16
    "loss_type": "trainer.loss_types",
    "reference_free": "trainer.args.reference_free",
    "precompute_ref_log_probs": "trainer.precompute_ref_logps",
    "model_adapter_name": "trainer.model.active_adapter",
    "null_ref_context": "`with trainer.model.disable_adapter():`",
    "max_length": "trainer.args.max_length",
    "max_prompt_length": "trainer.args.max_prompt_length",
    "truncation_mode": "trainer.args.truncation_mode",
    "is_peft_model": "isinstance(trainer.model, peft.PeftModel)",
    "is_encoder_decoder": "False: models are causal LMs",
    "padding_value": "trainer.collator.pad_token_id",
    "label_pad_token_id": "fastdpo.IGNORE_INDEX",
    "dataset_num_proc": "trainer.args.dataset_num_proc",
    "dpo_loss": "fastdpo.preference_loss",
    "concatenated_forward": "fastdpo.packed_logps",
    "concatenated_inputs": "fastdpo.pack_pairs",
    "get_batch_loss_metrics": "trainer.compute_loss, whose metrics are logged",
    "tokenize_row": "fastdpo.data.prepare.prepare_preference_dataset",
    "store_metrics": "trainer.log",
}


# TRL's attribute -> the setting in DPOConfig.
_LOSS_SETTINGS: Mapping[str, str] = {
    "beta": "beta",
    "loss_types": "loss_type",
    "loss_weights": "loss_weights",
    "label_smoothing": "label_smoothing",
    "f_divergence_type": "f_divergence_type",
    "f_alpha_divergence_coef": "f_alpha_divergence_coef",
    "ld_alpha": "ld_alpha",
    "use_weighting": "use_weighting",
}


class _LossSetting:
    """A setting of the loss as an attribute of the trainer. Assigned values are checked and take effect at once."""

    def __init__(self, name: str) -> None:
        self.name = name  # in the settings

    def __get__(self, trainer: Any, owner: type | None = None) -> Any:
        if trainer is None:
            return self
        value = getattr(trainer.args, self.name)
        is_default = self.name == "loss_weights" and value is None
        return [1.0] * len(trainer.args.loss_type) if is_default else value

    def __set__(self, trainer: Any, value: Any) -> None:
        args = trainer.args
        before, was_listwise = getattr(args, self.name), is_listwise(args)
        setattr(args, self.name, value)
        try:
            args.check()
            if is_listwise(args) and not was_listwise:
                raise ValueError(
                    f"loss_type must be set to a listwise loss in the config, got {value!r} after the trainer prepared"
                    " its rows as pairs"
                )
        except ValueError:
            setattr(args, self.name, before)
            raise
        trainer.collator.shared_parts = args.ld_alpha is not None


def with_trl_attributes(trainer_class: type[T]) -> type[T]:
    """The class with the public attributes of TRL 1.16's DPOTrainer that are not its methods."""
    for name, setting in _LOSS_SETTINGS.items():
        setattr(trainer_class, name, _LossSetting(setting))
    for read in (ref_model, ref_adapter_name, precompute_ref_logps, aux_loss_enabled, padding_free):
        setattr(trainer_class, read.__name__, property(read))
    trainer_class.__getattr__ = _say_what_to_read  # type: ignore[attr-defined]
    return trainer_class


def ref_model(trainer: Any) -> nn.Module | None:
    """The reference model; None if the reference is an adapter or cached, or if there is no reference."""
    return trainer.reference.model if isinstance(trainer.reference, FrozenReference) else None


def ref_adapter_name(trainer: Any) -> str | None:
    """Name of the adapter that serves as reference; None if no adapter does."""
    has_one = is_peft_model(trainer.model) and REFERENCE_ADAPTER in trainer.model.peft_config
    return REFERENCE_ADAPTER if has_one else None


def precompute_ref_logps(trainer: Any) -> bool:
    """Whether reference log-probs are known before training: computed once, or columns of the dataset."""
    reference: Reference | None = trainer.reference
    return trainer.args.reference == "cached" if reference is None else reference.mode == "cached"


def aux_loss_enabled(trainer: Any) -> bool:
    """Whether the experts' load-balancing loss is added."""
    return trainer.router_aux_loss_coef > 0


def padding_free(trainer: Any) -> bool:
    """Whether batches are rows without padding, which is the default here."""
    return trainer.is_packed


def _say_what_to_read(trainer: Any, name: str) -> Any:
    """Raises AttributeError for an unknown name; for TRL's names it says what to read instead."""
    message = f"{type(trainer).__name__!r} object has no attribute {name!r}"
    if name in INSTEAD:
        message += f", which TRL's DPOTrainer has or had; read {INSTEAD[name]}"
    raise AttributeError(message, name=name, obj=trainer)
