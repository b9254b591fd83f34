"""Models from a config alone, on the meta device, with an adapter if there is one: shapes and dtypes, no memory.

Refuses an adapter if peft is not installed.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from fastdpo.modeling.backbone import freeze_towers
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
