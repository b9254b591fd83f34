"""Converts the options of LoRA and quantized bases to what trainers take: a LoraConfig, a BitsAndBytesConfig.

Refused with ValueError: values that the packages do not accept, and a missing package. Warns if dropout has no effect.
"""

from __future__ import annotations

from typing import Any

from transformers.utils import logging

from fastdpo.cli.arguments import LoraArguments
from fastdpo.training.settings.engine import EngineConfig

logger = logging.get_logger(__name__)


def warn_of_dropout(adapter: LoraArguments, args: EngineConfig) -> None:
    """Warns that disable_dropout, on by default as in TRL, also sets the adapter's dropout to 0."""
    if adapter.lora_dropout > 0 and args.disable_dropout:
        logger.warning(
            f"lora_dropout={adapter.lora_dropout} has no effect: disable_dropout (on by default, as in TRL) sets every"
            " dropout to 0; to use dropout, add --no_disable_dropout."
        )


def quantization_config(adapter: LoraArguments, dtype: str | None = None) -> Any:
    """The BitsAndBytesConfig; None if the base model is not quantized.

    Args:
        dtype: of the other weights, and of products with 4-bit weights, which are in bfloat16 without one.
    """
    if not (adapter.load_in_4bit or adapter.load_in_8bit):
        return None
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        bits = "load_in_4bit" if adapter.load_in_4bit else "load_in_8bit"
        raise ValueError(f'{bits} needs bitsandbytes: pip install "fastdpo[quant]"') from error
    from transformers import BitsAndBytesConfig

    if adapter.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    try:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=adapter.bnb_4bit_quant_type,
            bnb_4bit_compute_dtype="bfloat16" if dtype in (None, "auto") else dtype,
            bnb_4bit_use_double_quant=adapter.use_bnb_nested_quant,
            bnb_4bit_quant_storage=adapter.bnb_4bit_quant_storage,
        )
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"bnb_4bit_quant_storage must be a dtype such as uint8 or bfloat16, got"
            f" {adapter.bnb_4bit_quant_storage!r}: {error}"
        ) from error


def lora_config(adapter: LoraArguments) -> Any:
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ValueError('use_peft needs the peft package: pip install "fastdpo[peft]"') from error
    return LoraConfig(
        r=adapter.lora_r,
        lora_alpha=adapter.lora_alpha,
        lora_dropout=adapter.lora_dropout,
        target_modules=_target_modules(adapter),
        target_parameters=adapter.lora_target_parameters,
        modules_to_save=adapter.lora_modules_to_save,
        use_rslora=adapter.use_rslora,
        use_dora=adapter.use_dora,
        task_type="CAUSAL_LM",
    )


def _target_modules(adapter: LoraArguments) -> str | list[str] | None:
    """The given layers; by default all linear layers, or none if only parameters are named."""
    layers = adapter.lora_target_modules
    if layers is None and adapter.lora_target_parameters is not None:
        return []
    return "all-linear" if layers in (None, ["all-linear"]) else layers


def ignore_bias_buffers(model: Any) -> None:
    """Excludes boolean buffers, which some models register as masks, from DDP's synchronization."""
    names = [name for name, buffer in model.named_buffers() if str(buffer.dtype) == "torch.bool"]
    model._ddp_params_and_buffers_to_ignore = names
