"""PEFT adapters as what is trained: a new one put on a model, or the one that a PeftModel brings.

In: a model, and a peft_config or none. Out: the model to train. Refuses adapters that packed rows or the fused head
would get wrong, and PeftModels that could not be trained, before any weight is changed.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import set_seed
from transformers.utils import logging

from fastdpo.references.adapters import REFERENCE_ADAPTER, drop_own_copy, freeze_reference, is_peft_model
from fastdpo.training.setup.adapter_facts import merging_tied
from fastdpo.training.setup.adapter_targets import check_targets, on_text_layers

logger = logging.get_logger(__name__)

# Methods that the tests hold to the model's own forward; all work on single layers and see one token at a time
PEFT_TYPES = frozenset(
    {
        *("LORA", "IA3", "LOHA", "LOKR", "VERA", "OFT", "BOFT", "HRA", "FOURIERFT", "LN_TUNING", "MISS", "C3A", "ROAD"),
        *("RANDLORA", "VBLORA", "SHIRA", "TRAINABLE_TOKENS"),
    }
)
_REASONS = {
    "ADALORA": "its ranks are allotted by a call after every step, which this trainer does not make",
    "XLORA": "it mixes adapters by a first forward over the whole row, and a packed row holds many sequences",
    "ADAPTION_PROMPT": "its prompt tokens have no place in a packed row",
}
# fields of LoraConfig that switch on a variant which the tests do not cover
_LORA_VARIANTS = (
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config", "velora_config"),
    *("use_bdlora", "use_qalora"),
)


def with_adapter(model: Any, peft_config: Any, args: Any, *, trains: bool = True) -> Any:
    """The model that is trained: `model` itself, or with a new adapter on it where there is a `peft_config`.

    Args:
        args: seed and gradient_checkpointing count.
        trains: False where the model is only evaluated, which a frozen adapter may be.
    Raises:
        ValueError: the adapter, or the two together, cannot be trained here.
    """
    if peft_config is not None:
        model = _with_new_adapter(model, peft_config, args.seed)
    elif _has_adapter(model):
        _check_given(model)
    if is_peft_model(model):
        drop_own_copy(model)
        freeze_reference(model)
        if trains and not any(p.requires_grad for p in model.parameters()):
            raise ValueError(
                "model must have weights to train, its adapter is frozen: load it with"
                " PeftModel.from_pretrained(..., is_trainable=True)"
            )
        if args.gradient_checkpointing:
            model.enable_input_require_grads()
        if trains and (words := merging_tied(model)):
            logger.warning(f"The adapter is {words}." if words.startswith("on ") else f"{words[0].upper()}{words[1:]}.")
    return model


def _with_new_adapter(model: nn.Module, peft_config: Any, seed: int) -> Any:
    try:
        from peft import PeftConfig, get_peft_model
    except ImportError as error:
        raise ValueError('peft_config needs the peft package: pip install "fastdpo[peft]"') from error
    if not isinstance(peft_config, PeftConfig):
        raise ValueError(f"peft_config must be a peft.PeftConfig such as LoraConfig, got {type(peft_config).__name__}")
    if _has_adapter(model):
        raise ValueError(
            "peft_config must be None where the model already has an adapter: leave it out to train that one on, or"
            " put the new one on model.merge_and_unload(), or on model.unload() to forget the old one"
        )
    _check_method(peft_config, "peft_config")
    check_targets(model, peft_config)
    set_seed(seed)  # adapters start from random weights
    return get_peft_model(model, on_text_layers(model, peft_config))


def _check_given(model: Any) -> None:
    if not is_peft_model(model):
        raise ValueError(
            f"model must be a PeftModel where it has an adapter, got a {type(model).__name__} with the adapter inside:"
            " use PeftModel.from_pretrained(base_model, adapter, is_trainable=True), or, where an earlier run put it"
            " there, what unload() of that run's model gives"
        )
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not isinstance(model, PeftModel):
        raise ValueError(f"model must be a PeftModel where it has an adapter, got {type(model).__name__}")
    _check_method(model.peft_config[model.active_adapter], "the model's adapter")
    active = model.base_model.active_adapters
    if len(active) != 1:
        raise ValueError(f"model must have one active adapter, the one to train, got {active}: use set_adapter")
    if active[0] == REFERENCE_ADAPTER:
        raise ValueError(
            f"model must train an adapter of another name than {REFERENCE_ADAPTER!r}: that is the reference's"
        )
    if any(module.merged for module in model.modules() if isinstance(module, BaseTunerLayer)):
        raise ValueError("model must not have its adapter merged, which would not be trained: call unmerge_adapter()")


def _has_adapter(model: Any) -> bool:
    """Whether adapter layers are in the model; PEFT leaves its configs on the bare model too, until it is unloaded."""
    return bool(getattr(model, "peft_config", None))


def _check_method(config: Any, name: str) -> None:
    method = getattr(config.peft_type, "value", config.peft_type)
    if config.is_prompt_learning:
        raise ValueError(f"{name} must not be {method}: virtual prompt tokens have no place in a packed row; use LoRA")
    if method not in PEFT_TYPES:
        reason = _REASONS.get(method, "it has not been tried with packed rows")
        raise ValueError(f"{name} must be one of {', '.join(sorted(PEFT_TYPES))}, got {method}: {reason}")
    variants = [field for field in _LORA_VARIANTS if getattr(config, field, None)]
    if variants:
        raise ValueError(f"{name} must leave {variants[0]} alone: it has not been tried with packed rows")
