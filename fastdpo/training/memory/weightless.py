"""Models from a config alone, on the meta device, with an adapter if there is one: shapes and dtypes, no memory.

Refuses an adapter if peft is not installed.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from fastdpo.modeling.backbone import bare_model, freeze_towers
from fastdpo.training.memory.estimate import BYTES_IN_4_BIT
from fastdpo.training.setup.adapter_targets import on_text_layers
from fastdpo.training.setup.model_kinds import auto_class


def weightless_model(config: Any, dtype: torch.dtype, peft_config: Any = None) -> Any:
    """The model, with a new adapter if there is a peft_config.

    Raises:
        ValueError: peft is not installed.
    """
    with torch.device("meta"):
        model: Any = auto_class(config).from_config(config, dtype=dtype)
    model.tie_weights()
    freeze_towers(model)
    if peft_config is None:
        return model
    try:
        from peft import get_peft_model
    except ImportError as error:
        raise ValueError('a plan with LoRA needs the peft package: pip install "fastdpo[peft]"') from error
    with warnings.catch_warnings():  # of transformers about a name that PEFT still uses
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(model, on_text_layers(model, peft_config), low_cpu_mem_usage=True)


def in_fewer_bits(model: Any, bits: int) -> tuple[int, int]:
    """Bytes that quantized linear layers save, and those of the largest layer's temporary copy in bf16.

    Args:
        model: with or without an adapter, whose layers are not quantized; neither is the head.
    """
    bytes_each = BYTES_IN_4_BIT if bits == 4 else 1.0
    head = bare_model(model).get_output_embeddings()
    linear = [
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and "lora_" not in name
    ]
    saved = sum(weight.numel() * (weight.element_size() - bytes_each) for weight in linear)
    return int(saved), max((weight.numel() * 2 for weight in linear), default=0)
