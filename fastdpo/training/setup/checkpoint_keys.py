"""Checks that a checkpoint has exactly the model's weights, under the model's names.

In: the report of from_pretrained on names (`output_loading_info`). Refused: missing weights, which would be random, and
unexpected weights, which would be lost; the message lists the names and their common prefix.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

_SHOWN = 3


def check_all_loaded(name: str, info: Mapping[str, Any]) -> None:
    """Raises:
    ValueError: a weight is missing or unexpected.
    """
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if not (missing or unexpected):
        return
    facts = [
        _named("missing weights, which would be random", missing),
        _named("unexpected weights, which would be lost", unexpected),
    ]
    prefix = _common_prefix(missing, unexpected)
    hint = f". All names begin with {prefix!r}: save the weights without it" if prefix else ""
    raise ValueError(
        f"model must have exactly its own weights in {name!r}, got {'; '.join(filter(None, facts))}{hint}. To"
        " train it anyway, load it yourself and pass the model instead of its name"
    )


def _named(what: str, keys: Collection[str]) -> str:
    if not keys:
        return ""
    kinds = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", key) for key in keys))  # the layers of one weight are one kind
    shown = ", ".join(kinds[:_SHOWN]) + (f" and {len(kinds) - _SHOWN} more kinds" if len(kinds) > _SHOWN else "")
    return f"{len(keys)} {what} ({shown})"


def _common_prefix(missing: Collection[str], unexpected: Collection[str]) -> str:
    """The prefix with which every missing name occurs among the unexpected ones."""
    for found in unexpected:
        for wanted in missing:
            if found.endswith(f".{wanted}"):
                prefix = found.removesuffix(wanted)
                return prefix if all(prefix + name in unexpected for name in missing) else ""
    return ""
