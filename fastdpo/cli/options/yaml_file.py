"""Reads a YAML or JSON file that somebody else may have written: plain values only, of a bounded size.

Refused with ValueError: a file that is too large, that is no YAML, that holds tags of Python objects, or that holds
more values than MOST_VALUES once its aliases are written out (nine lines of aliases can stand for a billion values).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

MOST_BYTES = 4 * 2**20
MOST_VALUES = 100_000


def read_yaml(path: str | Path, what: str) -> Any:
    """The file's value.

    Args:
        what: name of the file in errors, such as "config run.yaml".
    Raises:
        ValueError: see above.
    """
    size = Path(path).stat().st_size
    if size > MOST_BYTES:
        raise ValueError(f"{what} must have at most {MOST_BYTES:,} bytes, got {size:,}")
    try:
        value = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no UTF-8, or a date that does not exist
        raise ValueError(f"{what} is not valid YAML: {error}") from error
    except RecursionError:
        raise ValueError(f"{what} must not nest its values so deeply") from None
    waiting, num_values = [value], 0
    while waiting:
        item = waiting.pop()
        num_values += 1
        if num_values > MOST_VALUES:
            raise ValueError(
                f"{what} must hold at most {MOST_VALUES:,} values, got more (are there aliases of aliases?)"
            )
        if isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item
    return value
