"""Files with which a stopped run continues: settings that must not change, and JSON that is never half-written.

In: JSON values. Out: the same, from a file. Refuses to continue a run with other settings, and names the first that
differs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fastdpo.files import write_whole


def read_json(path: Path) -> dict[str, Any]:
    """The content of the file; empty if there is no file."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes the file atomically. Creates its folder if necessary."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(content, indent=1) + "\n")


def as_stored(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as JSON gives them back: tuples become lists."""
    stored: dict[str, Any] = json.loads(json.dumps(dict(settings)))
    return stored


def check_same(
    stored: Mapping[str, Any], now: Mapping[str, Any], path: Path, remedy: str, *, may_differ: Collection[str] = ()
) -> None:
    """Raises ValueError if a setting differs from the stored one.

    Args:
        path: where the settings are stored.
        remedy: what to do for other settings.
        may_differ: settings that may change between runs.
    """
    now = as_stored(now)
    for name in [*now, *(name for name in stored if name not in now)]:
        if name not in may_differ and stored.get(name) != now.get(name):
            raise ValueError(
                f"{name} must be {stored.get(name)!r}, as in {path}, got {now.get(name)!r}; {remedy} for other settings"
            )


def digest(value: Any) -> str:
    """A short fingerprint of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
