"""Rotary positions whose frequencies follow the longest sequence of a batch: a model and a dataset in, a warning out.

With the rope types "longrope" (Phi-3 with 128k tokens) and "dynamic", transformers changes the frequencies as soon as
one position of a batch exceeds the model's original training length, for every sequence of the batch, packed or padded.
"longrope" has one other set of frequencies, "dynamic" one per longest length, kept until a short batch comes. A
sequence then has other log-probs than by itself, which a self-check on short rows cannot detect.
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from torch import nn
from transformers.utils import logging

from fastdpo.data.batches.lengths import row_lengths
from fastdpo.modeling.backbone import bare_model

logger = logging.get_logger(__name__)

FOLLOW_LENGTH = ("longrope", "dynamic")


def warn_of_mixed_lengths(model: nn.Module, dataset: Dataset, name: str) -> None:
    """Warns if the frequencies for sequences of a prepared dataset depend on the batch."""
    found = length_dependent_rope(bare_model(model).config.get_text_config())
    if found is None:
        return
    rope_type, limit = found
    lengths = row_lengths(dataset).sequences
    num_longer = int((lengths > limit).sum())
    if num_longer > 0 and (rope_type == "dynamic" or num_longer < len(lengths)):
        logger.warning(
            f"{num_longer} of {len(lengths)} sequences of the {name} dataset are longer than {limit} tokens, where this"
            " model's rotary positions change for all sequences of a batch: log-probs of shorter ones depend on which"
            f" batch they are in. Set max_length={limit} to avoid this."
        )


def length_dependent_rope(config: Any) -> tuple[str, int] | None:
    """Rope type, and the number of tokens up to which the original frequencies apply; None if they never change."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]  # some have one for each layer type
    for kind in kinds:
        if kind.get("rope_type") in FOLLOW_LENGTH:
            original = kind.get("original_max_position_embeddings")
            limit = original or getattr(config, "original_max_position_embeddings", config.max_position_embeddings)
            return kind["rope_type"], int(limit)
    return None
