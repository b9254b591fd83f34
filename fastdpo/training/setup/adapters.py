"""Trainable PEFT adapters: a new adapter on a model, or the existing one of a PeftModel.

In: a model, and a peft_config or None. Out: the model to train. Before any weight is changed, it refuses adapters that
do not work with packed rows or the fused head, and PeftModels that cannot be trained.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import set_seed
from transformers.utils import logging

from fastdpo.references.adapters import REFERENCE_ADAPTER, drop_own_copy, freeze_reference, is_peft_model
from fastdpo.training.setup.adapter_facts import merging_tied
from fastdpo.training.setup.adapter_targets import check_targets, on_text_layers
from fastdpo.training.setup.cut_adapters import check_adapter_of_cut, cut_adapter
from fastdpo.training.setup.tensor_parallel import is_cut

logger = logging.get_logger(__name__)

# Methods that the tests compare with the model's own forward; all work on single layers, token by token
PEFT_TYPES = frozenset(
    {
        *("LORA", "IA3", "LOHA", "LOKR", "VERA", "OFT", "BOFT", "HRA", "FOURIERFT", "LN_TUNING", "MISS", "C3A", "ROAD"),
        *("RANDLORA", "VBLORA", "SHIRA", "TRAINABLE_TOKENS"),
    }
)
_REASONS = {
    "ADALORA": "it needs a call after every step to allot ranks, which this trainer does not make",
    "XLORA": "it mixes adapters by a first forward over the whole row, and a packed row holds many sequences",
    "ADAPTION_PROMPT": "packed rows do not support its prompt tokens",
}
# fields of LoraConfig that enable variants without tests
_LORA_VARIANTS = (
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config", "velora_config"),
    *("use_bdlora", "use_qalora"),
)


def with_adapter(model: Any, peft_config: Any, args: Any, *, trains: bool = True) -> Any:
    """The model to train: `model` itself, or, with a `peft_config`, the model with a new adapter.

    Args:
        args: seed and gradient_checkpointing are read.
        trains: False if the model is only evaluated; its adapter may then be frozen.
    Raises:
        ValueError: the adapter, or this combination of model and adapter, cannot be trained.
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
                "model must have trainable weights, got a frozen adapter: load it with"
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
            "peft_config must be None if the model already has an adapter: leave it out to continue training that"
            " adapter, or use model.merge_and_unload() (keeps its effect) or model.unload() (drops it) for a new one"
        )
    _check_method(peft_config, "peft_config")
    check_targets(model, peft_config)
    if is_cut(model):
        check_adapter_of_cut(model, peft_config)
    set_seed(seed)  # adapters start from random weights
    peft_model = get_peft_model(model, on_text_layers(model, peft_config))
    if is_cut(model):
        cut_adapter(peft_model, seed)
    return peft_model


def _check_given(model: Any) -> None:
    if not is_peft_model(model):
        raise ValueError(
            f"model must be a PeftModel if it has an adapter, got a {type(model).__name__} with an adapter inside:"
            " use PeftModel.from_pretrained(base_model, adapter, is_trainable=True), or, if an earlier run added the"
            " adapter, the result of unload() on that run's model"
        )
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not isinstance(model, PeftModel):
        raise ValueError(f"model must be a PeftModel if it has an adapter, got {type(model).__name__}")
    _check_method(model.peft_config[model.active_adapter], "the model's adapter")
    active = model.base_model.active_adapters
    if len(active) != 1:
        raise ValueError(f"model must have one active adapter, the one to train, got {active}: use set_adapter")
    if active[0] == REFERENCE_ADAPTER:
        raise ValueError(
            f"model must train an adapter with a name other than {REFERENCE_ADAPTER!r}, which is the reference's"
        )
    if any(module.merged for module in model.modules() if isinstance(module, BaseTunerLayer)):
        raise ValueError(
            "model must have an unmerged adapter, got a merged one, which cannot be trained: call unmerge_adapter()"
        )


def _has_adapter(model: Any) -> bool:
    """Whether the model has adapter layers; PEFT also leaves its configs on the bare model until it is unloaded."""
    return bool(getattr(model, "peft_config", None))


def _check_method(config: Any, name: str) -> None:
    method = getattr(config.peft_type, "value", config.peft_type)
    if config.is_prompt_learning:
        raise ValueError(f"{name} must not be {method}: packed rows do not support virtual prompt tokens; use LoRA")
    if method not in PEFT_TYPES:
        reason = _REASONS.get(method, "it has not been tried with packed rows")
        raise ValueError(f"{name} must be one of {', '.join(sorted(PEFT_TYPES))}, got {method}: {reason}")
    variants = [field for field in _LORA_VARIANTS if getattr(config, field, None)]
    if variants:
        raise ValueError(f"{name} must not use {variants[0]}, which has not been tried with packed rows")
