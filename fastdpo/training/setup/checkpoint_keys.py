"""Whether a checkpoint's weights are the model's: all of them, under its names, and no others.

In: what from_pretrained says of the names that it found (`output_loading_info`). Refused: weights that are missing,
which would be random, or that have no place, which would be lost; with the names, and what they have in common.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

_SHOWN = 3


def check_all_loaded(name: str, info: Mapping[str, Any]) -> None:
    """Raises:
    ValueError: a weight is missing, or one is there that the model does not have.
    """
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if not (missing or unexpected):
        return
    facts = [_named("missing, and would be random", missing), _named("not the model's, and would be lost", unexpected)]
    prefix = _common_prefix(missing, unexpected)
    hint = f". All names begin with {prefix!r}: save the weights without it" if prefix else ""
    raise ValueError(
        f"model must have all of its weights in {name!r} and no others: {'; '.join(filter(None, facts))}{hint}. To"
        " train it as it is all the same, load it yourself and give the model in place of its name"
    )


def _named(what: str, keys: Collection[str]) -> str:
    if not keys:
        return ""
    kinds = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", key) for key in keys))  # the layers of one weight are one kind
    shown = ", ".join(kinds[:_SHOWN]) + (f" and {len(kinds) - _SHOWN} more kinds" if len(kinds) > _SHOWN else "")
    return f"{len(keys)} {what} ({shown})"


def _common_prefix(missing: Collection[str], unexpected: Collection[str]) -> str:
    """What stands before every missing name among the unexpected ones."""
    for found in unexpected:
        for wanted in missing:
            if found.endswith(f".{wanted}"):
                prefix = found.removesuffix(wanted)
                return prefix if all(prefix + name in unexpected for name in missing) else ""
    return ""
