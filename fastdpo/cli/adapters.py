"""The options of LoRA and 4-bit bases as what trainers take: a LoraConfig, a BitsAndBytesConfig.

Refuses with ValueError what the options cannot have together, and a package that is missing.
"""

from __future__ import annotations

from typing import Any

from fastdpo.cli.arguments import LoraArguments
from fastdpo.training.config import EngineConfig


def check_dropout(adapter: LoraArguments, args: EngineConfig) -> None:
    if adapter.lora_dropout > 0 and args.disable_dropout:
        raise ValueError(
            "lora_dropout must go with --no_disable_dropout, without which every dropout is set to 0, got"
            f" {adapter.lora_dropout}"
        )


def quantization_config() -> Any:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ValueError('load_in_4bit needs bitsandbytes: pip install "fastdpo[quant]"') from error
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


def lora_config(adapter: LoraArguments) -> Any:
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ValueError('use_peft needs the peft package: pip install "fastdpo[peft]"') from error
    layers = adapter.lora_target_modules or ["all-linear"]
    return LoraConfig(
        r=adapter.lora_r,
        lora_alpha=adapter.lora_alpha,
        lora_dropout=adapter.lora_dropout,
        target_modules="all-linear" if layers == ["all-linear"] else layers,
        task_type="CAUSAL_LM",
    )
