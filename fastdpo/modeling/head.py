"""The LM head of a causal LM as the arguments that the head op takes: weight, bias, logit scale, softcap.

Refuses heads that are not one plain linear layer, because their logits would be something else than the op computes.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class LMHead(NamedTuple):
    """`softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)`, without the tanh where softcap is None."""

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    logit_scale: float
    softcap: float | None


# config field -> the factor that it puts on the logits, with the model families that have it
_LOGIT_SCALES = {
    "logit_scale": lambda value: value,  # Cohere
    "logits_scaling": lambda value: 1.0 / value,  # Granite, MiniCPM3
    "lm_head_multiplier": lambda value: value,  # Falcon-H1
    "output_multiplier": lambda value: value,
}
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma; RecurrentGemma; xLSTM
_MULTIPLIES_LOGITS_SCALING = {"hyperclovax"}


def lm_head(model: Any) -> LMHead:
    """The head of a bare causal LM.

    Raises:
        ValueError: the output embedding is not a plain linear layer.
    """
    layer = model.get_output_embeddings()
    if layer is None or getattr(layer, "weight", None) is None or layer.weight.dim() != 2:
        raise ValueError(f"model must have an LM head with a (V, H) weight, {type(model).__name__} has {layer!r}")
    if any(hasattr(layer, name) for name in ("base_layer", "modules_to_save", "original_module")):  # PEFT's wrappers
        raise ValueError(
            "peft_config must leave the LM head alone: remove 'lm_head' from target_modules and modules_to_save; an"
            " adapter on the head is not part of the fused head op"
        )
    if layer.weight.dtype.itemsize < 2 or not layer.weight.dtype.is_floating_point:
        raise ValueError(
            f"the LM head must hold fp32, fp16 or bf16 weights, {type(model).__name__} has {layer.weight.dtype}"
        )
    with resident(layer):  # what it holds there stays for as long as this call's caller needs it
        weight, bias = layer.weight, getattr(layer, "bias", None)
    config = model.config.get_text_config()
    scale = 1.0
    for field, factor in _LOGIT_SCALES.items():
        value = getattr(config, field, None)
        if isinstance(value, int | float):
            multiplies = field == "logits_scaling" and config.model_type in _MULTIPLIES_LOGITS_SCALING
            scale *= value if multiplies else factor(value)
    return LMHead(
        weight=weight,
        bias=bias,
        logit_scale=scale,
        softcap=next((cap for name in _SOFTCAPS if (cap := getattr(config, name, None)) is not None), None),
    )


def resident(module: nn.Module) -> Any:
    """A context in which the module's own weights are on its device, also where accelerate keeps them elsewhere."""
    if not hasattr(module, "_hf_hook"):
        return nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module)


def execution_device(model: nn.Module) -> torch.device:
    """Where a bare model's inputs belong, also where accelerate keeps its weights elsewhere."""
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    device = next((device for device in devices if device is not None), None)
    return next(model.parameters()).device if device is None else torch.device(device)
