"""How deeply lists and objects may be nested inside each other. Imports only Python's standard library."""

from __future__ import annotations

from typing import Any

MOST_LEVELS = 100  # of a cell: what reads it calls itself for each level


def is_too_deep(value: Any, most: int = MOST_LEVELS) -> bool:
    """Whether lists and objects are nested more than `most` levels deep."""
    level = [value]
    for _ in range(most + 1):
        level = [
            item
            for outer in level
            if isinstance(outer, (list, tuple, dict))
            for item in (outer.values() if isinstance(outer, dict) else outer)
            if not isinstance(item, (str, int, float))
        ]
        if not level:
            return False
    return True
