"""The kind of model behind a config, and the class of transformers that loads it for training on text.

In: a config, before any weight is loaded. Out: an auto class. A multimodal checkpoint is loaded as transformers'
text-only causal LM if the checkpoint has all weights of that class and the class knows the other weights by name;
otherwise as the whole model, whose decoder is trained. Refused: encoders, models without text output.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto import modeling_auto
from transformers.utils import logging

_OF_COMPOSITES = ("AutoModelForImageTextToText", "AutoModelForMultimodalLM")


def has_other_parts(config: Any) -> bool:
    """Whether the text decoder is one of several parts of the model."""
    return text_part(config) is not config


def text_part(config: Any) -> Any:
    """The config of the part that reads and writes text.

    Raises:
        ValueError: there are several such parts.
    """
    try:
        return config.get_text_config()
    except ValueError as error:
        parts = str(error).partition(". ")[0]
        raise ValueError(f"model must have one text decoder, got {config.model_type} with several: {parts}") from error


def check_kind(config: Any, name: str) -> None:
    """Raises:
    ValueError: the config's model cannot be trained on text as a causal LM.
    """
    kind = f"{name} ({config.model_type})"
    is_causal_lm = type(config) in AutoModelForCausalLM._model_mapping or _names_its_code(config)
    if is_encoder(config):
        raise ValueError(
            f"model must be a causal LM, got {kind}, which is an encoder: every token attends to later tokens, so it"
            " gives no log-probs of responses"
        )
    text = text_part(config)
    if 0 < getattr(text, "num_kv_shared_layers", 0) == getattr(text, "num_hidden_layers", None):
        raise ValueError(
            f"model must be a causal LM, got {kind}, a draft model for speculative decoding: all of its layers read the"
            " keys and values of another model"
        )
    if is_causal_lm or auto_classes(config):
        return
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"model must be a causal LM, got {kind}, which is an encoder-decoder")
    raise ValueError(f"model must be a causal LM or have one inside, got {kind}, which gives no text")


def is_encoder(config: Any) -> bool:
    """Whether a type of model is an encoder for masked tokens; transformers can also run some of these as decoders."""
    known = getattr(modeling_auto, "MODEL_FOR_MASKED_LM_MAPPING_NAMES", {})
    return config.model_type in known and not (
        getattr(config, "is_encoder_decoder", False) or getattr(config, "is_decoder", False)
    )


def auto_classes(config: Any) -> list[Any]:
    """The auto classes that know a config, in order of preference; empty if transformers has none."""
    classes = [AutoModelForCausalLM]
    if has_other_parts(config):
        classes += [getattr(transformers, name) for name in _OF_COMPOSITES if hasattr(transformers, name)]
    return [cls for cls in classes if type(config) in cls._model_mapping or _names_its_code(config, cls.__name__)]


def auto_class(config: Any, name: str | None = None, **loading: Any) -> Any:
    """The auto class that gives the model to train.

    Args:
        name: name of the checkpoint, whose weight names are checked if a text-only class would skip some; None for no
            checkpoint, and the first class that knows the config is used.
        loading: arguments of from_pretrained.
    """
    classes = auto_classes(config) or [AutoModelForCausalLM]  # this class then raises its own error
    if name is None or len(classes) == 1 or not _is_text_only(classes[0], config):
        return classes[0]
    with _quiet():  # the load report of a trial
        _, info = classes[0].from_pretrained(
            name, **{**loading, "device_map": "meta", "dtype": torch.bfloat16}, output_loading_info=True
        )
    return classes[1] if info["missing_keys"] or info["unexpected_keys"] else classes[0]


def _is_text_only(cls: Any, config: Any) -> bool:
    """Whether an auto class makes a text-only model from a composite's config."""
    found = cls._model_mapping.get(type(config), None)
    return getattr(found, "config_class", None) is type(text_part(config))


def _names_its_code(config: Any, name: str = "AutoModelForCausalLM") -> bool:
    return name in (getattr(config, "auto_map", None) or {})


@contextmanager
def _quiet() -> Iterator[None]:
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
