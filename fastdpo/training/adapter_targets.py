"""Whether the layers that an adapter is asked for are there: PEFT trains those that it finds, and says nothing of the
others.

In: a model and a PeftConfig. Refused: a name in it that is none of the model's, with the nearest that are.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

_OF_MODULES = ("target_modules", "modules_to_save", "feedforward_modules")


def check_targets(model: nn.Module, peft_config: Any) -> None:
    """Raises:
    ValueError: a name that matches no layer, or no parameter, of the model.
    """
    modules = [name for name, _ in model.named_modules() if name]
    for field in _OF_MODULES:
        _check(field, getattr(peft_config, field, None), modules)
    _check(
        "target_parameters", getattr(peft_config, "target_parameters", None), [n for n, _ in model.named_parameters()]
    )


def _check(field: str, targets: str | Iterable[str] | None, names: Collection[str]) -> None:
    if targets is None or isinstance(targets, str):  # a pattern, of which PEFT itself says where it matches nothing
        return
    for target in sorted(targets):
        if any(name == target or name.endswith(f".{target}") for name in names):
            continue
        depth = target.count(".") + 1
        known = {".".join(name.split(".")[-depth:]) for name in names}
        nearest = difflib.get_close_matches(target, sorted(known), n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(map(repr, nearest))}?" if nearest else ""
        raise ValueError(f"{field} must name layers of the model, {target!r} is none{hint}")
