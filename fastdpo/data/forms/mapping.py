"""The setting `columns`: maps fastdpo's column names to a dataset's own names and lists ignored columns.

In: {"prompt": "instruction", "rejected": "worst", "ignore": ["foo", "bar"]} as a dict, as JSON, or in the notation of
the command line: prompt=instruction,rejected=worst,ignore=foo,bar. Out: the row with fastdpo's names.
Refused with ValueError: names that fastdpo does not read, columns that the row does not have.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastdpo.data.forms.names import IGNORE
from fastdpo.data.values import Example

_WRITTEN = "a mapping as prompt=instruction,rejected=worst,ignore=foo, or {'prompt': 'instruction', 'ignore': ['foo']}"


def as_columns(value: Any, known: Sequence[str]) -> dict[str, Any] | None:
    """The setting as a dict from our names to theirs, with the ignored columns as a list.

    Args:
        known: the names that the forms read.
    Raises:
        ValueError: the value is not a mapping, or it has a name that no form reads.
    """
    if value is None:
        return None
    pairs = _from_text(value) if isinstance(value, str) else value
    if not isinstance(pairs, Mapping):
        raise ValueError(f"columns must be {_WRITTEN}, got {value!r}")
    result: dict[str, Any] = {}
    for name, theirs in pairs.items():
        if name == IGNORE:
            result[IGNORE] = [theirs] if isinstance(theirs, str) else list(theirs or ())
            continue
        if name not in known:
            nearest = difflib.get_close_matches(str(name), (*known, IGNORE), n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(
                f"columns must map names that fastdpo reads, {IGNORE!r} or {list(known)}, got {name!r}{hint}"
            )
        if not isinstance(theirs, str) or not theirs:
            raise ValueError(f"columns must map {name!r} to the name of one column, got {theirs!r}")
        result[name] = theirs
    if not all(isinstance(name, str) for name in result.get(IGNORE, ())):
        raise ValueError(f"columns must map {IGNORE!r} to names of columns, got {result[IGNORE]!r}")
    return result or None


def renamed(example: Example, columns: Mapping[str, Any] | None) -> Example:
    """The row with renamed columns. An existing column of the new name is replaced unless the setting uses it.

    Raises:
        ValueError: the row has neither the column to rename nor a column of the new name.
    """
    if columns is None:
        return example
    sources = {ours: theirs for ours, theirs in columns.items() if ours != IGNORE}
    row = {name: value for name, value in example.items() if name not in sources and name not in sources.values()}
    for ours, theirs in sources.items():
        if theirs in example:
            row[ours] = example[theirs]
            if ours in example and ours not in sources.values():
                row[f"{ours} (before)"] = example[ours]
        elif _inside(example, theirs) is not None:
            row[ours] = _inside(example, theirs)
        elif ours in example:
            row[ours] = example[ours]
        else:
            raise ValueError(
                f"columns must map {ours!r} to a column of the dataset, one of {sorted(example)}, got {theirs!r}"
            )
    return row


def ignored_columns(example: Example, columns: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The columns to leave unread: those listed as ignored, and those replaced by a renamed column."""
    if columns is None:
        return ()
    return (*columns.get(IGNORE, ()), *(f"{ours} (before)" for ours in columns if ours in example))


def _inside(example: Example, path: str) -> Any:
    """The value under a path such as "info.post" in a column of objects."""
    value: Any = example
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _from_text(text: str) -> Any:
    if text.lstrip().startswith("{"):
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"columns must be {_WRITTEN}, got {text!r}: {error}") from error
    pairs: dict[str, Any] = {}
    name = ""
    for item in filter(None, (item.strip() for item in text.split(","))):
        ours, is_pair, theirs = item.partition("=")
        if is_pair:
            name = ours.strip()
        elif name != IGNORE:  # only `ignore` may have several names
            raise ValueError(f"columns must be {_WRITTEN}, got {text!r}")
        theirs = theirs.strip() if is_pair else ours.strip()
        if name == IGNORE:
            pairs[IGNORE] = [*pairs.get(IGNORE, []), theirs]
        elif name in pairs:
            raise ValueError(f"columns must name {name!r} only once, got {text!r}")
        else:
            pairs[name] = theirs
    return pairs
