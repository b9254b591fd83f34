"""Finds the part of a model that is trained on text: the decoder whose last hidden state is the input of the LM head.

In: a causal LM, bare or wrapped, or a multimodal model with a causal LM inside. Out: the bare model, that decoder, the
other towers, and the ids that stand for text. Refused: models without such a decoder, or without an LM head.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from fastdpo.modeling.head import num_output_ids

_PLACEHOLDER = re.compile(r"_token_(id|index)$")  # fields of composite configs: image_token_id, audio_token_index, ...
_OF_TOWERS = ("vision_config", "audio_config")  # parts of a decoder's config that are not of its text
_OF_TEXT = frozenset({"pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "sep_token_id"})


def bare_model(model: Any) -> Any:
    """The Hugging Face model inside DDP, FSDP, torch.compile and PEFT wrappers."""
    while True:
        if hasattr(model, "get_base_model"):  # PEFT
            model = model.get_base_model()
        elif hasattr(model, "_orig_mod"):  # torch.compile
            model = model._orig_mod
        elif isinstance(inner := getattr(model, "module", None), nn.Module) and not hasattr(
            type(model), "get_output_embeddings"
        ):
            model = inner  # DDP, FSDP1, DeepSpeed, whose engine has the model's attributes
        else:
            return model


def text_config(model: Any) -> Any:
    """The config of the decoder: the model's own, or the text part of a composite's config."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def is_composite(model: Any) -> bool:
    """Whether the decoder is one of several parts of the model."""
    return text_config(model) is not getattr(model, "config", None)


def backbone_name(model: Any) -> str:
    """The module name of the decoder in a bare model.

    Raises:
        ValueError: the model has no LM head, or no decoder.
    """
    kind = type(model).__name__
    head, embedding = _end(model, "get_output_embeddings"), _end(model, "get_input_embeddings")
    if head is None:
        raise ValueError(f"model must be a Hugging Face causal LM with a backbone and an LM head, got {kind}")
    prefix = getattr(model, "base_model_prefix", "")
    if not is_composite(model) and getattr(model, "base_model", model) is not model:
        return prefix
    config = text_config(model)
    for name, module in model.named_modules():  # the outermost come first
        if not name or type(getattr(module, "config", None)) is not type(config):
            continue
        inside = set(module.modules())
        if embedding in inside and head not in inside:
            return name
    raise ValueError(f"model must be a Hugging Face causal LM with a backbone and an LM head, got {kind}")


def backbone(model: Any) -> Any:
    """The decoder of a bare model, see `backbone_name`."""
    return model.get_submodule(backbone_name(model))


def tower_names(model: Any) -> list[str]:
    """The names of the outermost modules that text does not use; empty for a model without other parts."""
    if not is_composite(model):
        return _towers_in_decoder(model)
    used = {backbone(model), *_with_head(model)}
    names: list[str] = []
    for name, module in model.named_modules():
        if _inside_any(name, names):
            continue
        if name and used.isdisjoint(module.modules()) and not _inside(name, model, used):
            names.append(name)
    return [name for name in names if next(model.get_submodule(name).parameters(), None) is not None]


def _towers_in_decoder(model: Any) -> list[str]:
    """The towers of a model whose decoder holds them, as their configs show (GIT, Phi-4 multimodal)."""
    config: Any = getattr(model, "config", None)
    kinds = {type(part) for part in (getattr(config, name, None) for name in _OF_TOWERS) if part is not None}
    names: list[str] = []
    for name, module in model.named_modules() if kinds else ():
        if type(getattr(module, "config", None)) in kinds and not _inside_any(name, names):
            names.append(name)
    used = set(_with_head(model))
    return list(dict.fromkeys(_outermost_without(used, name, model) for name in names))


def _outermost_without(used: set[nn.Module], name: str, model: Any) -> str:
    """The largest module around a tower that holds none of these."""
    outer = name.rpartition(".")[0]
    if outer and used.isdisjoint(model.get_submodule(outer).modules()):
        return _outermost_without(used, outer, model)
    return name


def freeze_towers(model: Any) -> list[str]:
    """Freezes the modules that text does not train; returns their names."""
    names = tower_names(model)
    for name in names:
        model.get_submodule(name).requires_grad_(False)
    if names:  # weights outside of modules, such as a separator of image rows
        trained = {id(p) for module in (backbone(model), *_with_head(model)) for p in module.parameters()}
        for parameter in model.parameters():
            if id(parameter) not in trained:
                parameter.requires_grad_(False)
    return names


def text_ids(model: Any) -> Tensor:
    """(N,) int64 ids of embedding and LM head that stand for text: in a composite, some ids mark images or audio."""
    embedding = _end(model, "get_input_embeddings")
    num_ids = min(num_output_ids(model), getattr(embedding, "num_embeddings", None) or num_output_ids(model))
    is_text = torch.ones(num_ids, dtype=torch.bool)
    if is_composite(model):
        for name, value in {**vars(text_config(model)), **vars(model.config)}.items():
            if _PLACEHOLDER.search(name) and name not in _OF_TEXT and isinstance(value, int) and 0 <= value < num_ids:
                is_text[value] = False
        for part in vars(model.config).values():  # Gemma 3n's towers have ids of their own from an offset on
            offset = getattr(part, "vocab_offset", None)
            if isinstance(offset, int) and offset > 0:
                is_text[offset:] = False
    return is_text.nonzero()[:, 0]


def _inside_any(name: str, names: list[str]) -> bool:
    return any(name == other or name.startswith(f"{other}.") for other in names)


def _with_head(model: Any) -> list[nn.Module]:
    return [module for module in (_end(model, "get_output_embeddings"), _end(model, "get_input_embeddings")) if module]


def _end(model: Any, method: str) -> nn.Module | None:
    """An embedding or a head; None if the model has none (some models raise in this case)."""
    try:
        found: nn.Module | None = getattr(model, method)()
    except (AttributeError, NotImplementedError):
        return None
    return found


def _inside(name: str, model: Any, modules: set[nn.Module]) -> bool:
    """Whether a module lies below one of the others."""
    parts = name.split(".")
    return any(model.get_submodule(".".join(parts[:depth])) in modules for depth in range(1, len(parts)))
