"""What the releases that pyproject.toml promises do not all have."""

from dataclasses import fields

import pytest
import torch
from transformers import TrainingArguments
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

SINCE_5_23 = {"activation_checkpointing", "activation_checkpointing_kwargs"}  # arguments of transformers
needs_activation_checkpointing = pytest.mark.skipif(
    not {f.name for f in fields(TrainingArguments)} >= SINCE_5_23,
    reason="transformers before 5.23 has gradient_checkpointing alone",
)


def config_of(model_type):
    """The config class of a kind of model, or a skip."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this release of transformers has no {model_type}")
    return CONFIG_MAPPING[model_type]


def bitsandbytes_on_a_cpu():
    """The package, or a skip where its optimizers take no step on a CPU (0.48 wants a GPU)."""
    bnb = pytest.importorskip("bitsandbytes")
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    try:
        bnb.optim.AdamW8bit([weight]).step()
    except (AttributeError, RuntimeError):
        pytest.skip("this release of bitsandbytes has optimizers for a GPU alone")
    return bnb
