"""How `iterate` and `sweep` show what they measured on held-out prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def spread(line: Mapping[str, Any], key: str) -> str:
    """A mean with its standard error."""
    return f"{line[key]:.3f} ± {line[f'{key}_stderr']:.3f}"


def kl_words(temperature: float = 1.0) -> str:
    """The estimator of the KL, in words."""
    words = "KL: nats per response, summed over the exact KL of each next token, on the model's own samples"
    if temperature == 1:
        return f"{words}, which is unbiased."
    return f"{words} at temperature {temperature:g}, which is biased: unbiased is temperature 1."
