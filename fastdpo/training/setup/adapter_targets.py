"""Checks that the target layers of an adapter exist, because PEFT silently ignores unknown names; and keeps adapters on
linear layers of the text decoder in multimodal models.

In: a model and a PeftConfig. Refused: a name that the model does not have, with the nearest existing names.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import nn

from fastdpo.modeling.backbone import tower_names

_OF_MODULES = ("target_modules", "modules_to_save", "feedforward_modules")


def check_targets(model: nn.Module, peft_config: Any) -> None:
    """Raises:
    ValueError: a name matches no layer, or no parameter, of the model.
    """
    modules = [name for name, _ in model.named_modules() if name]
    for field in _OF_MODULES:
        _check(field, getattr(peft_config, field, None), modules)
    _check(
        "target_parameters", getattr(peft_config, "target_parameters", None), [n for n, _ in model.named_parameters()]
    )


def on_text_layers(model: nn.Module, peft_config: Any) -> Any:
    """The config, or a copy that excludes modules: towers that text does not use, and for "all-linear" the layers that
    are not plain products (Llama 4's router returns two results).

    Raises:
        ValueError: the method cannot exclude modules, and would change a tower.
    """
    patterns = [rf"{re.escape(name)}(\..*)?" for name in tower_names(model)]
    if getattr(peft_config, "target_modules", None) == "all-linear":
        patterns += dict.fromkeys(re.sub(r"\\\.\d+\\\.", r"\.\\d+\.", re.escape(name)) for name in _no_products(model))
    if not patterns:
        return peft_config
    if not hasattr(peft_config, "exclude_modules"):
        method = getattr(peft_config.peft_type, "value", peft_config.peft_type)
        raise ValueError(f"peft_config must use a method with exclude_modules for this model, got {method}: use LoRA")
    given = peft_config.exclude_modules
    if isinstance(given, str):
        patterns.append(given)
    elif given:
        patterns += [rf"(.*\.)?{re.escape(name)}" for name in sorted(given)]
    peft_config = copy.copy(peft_config)
    peft_config.exclude_modules = "|".join(f"(?:{pattern})" for pattern in patterns)
    return peft_config


def _no_products(model: nn.Module) -> list[str]:
    """A model's own layers with a linear class whose output does not have the shape of a product."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and type(module).forward is not nn.Linear.forward
        and type(module).__module__.startswith(("transformers.models.", "transformers_modules."))
        and not _gives_product(module)
    ]


@torch.no_grad()
def _gives_product(module: nn.Linear) -> bool:
    try:
        result = module(module.weight.new_zeros(1, module.in_features))
    except Exception:  # any exception on an input of another shape
        return False
    return isinstance(result, torch.Tensor) and result.shape == (1, module.out_features)


def _check(field: str, targets: str | Iterable[str] | None, names: Collection[str]) -> None:
    if targets is None or isinstance(targets, str):  # a pattern: PEFT itself refuses one that matches nothing
        return
    for target in sorted(targets):
        if any(name == target or name.endswith(f".{target}") for name in names):
            continue
        depth = target.count(".") + 1
        known = {".".join(name.split(".")[-depth:]) for name in names}
        nearest = difflib.get_close_matches(target, sorted(known), n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(map(repr, nearest))}?" if nearest else ""
        raise ValueError(f"{field} must name layers of the model, got {target!r}{hint}")
