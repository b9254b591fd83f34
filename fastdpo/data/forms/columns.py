"""Finds the columns of a row by kind, whatever their names, and keeps a ledger of the columns that were read.

In: a row of the dataset. Out: `Cells`, which finds columns by kind and records which ones a form reads; `ledger`
reports the others. Refused with ValueError: an unread column with text or messages whose name does not mark it as
metadata.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from fastdpo.data.depth import MOST_LEVELS, is_too_deep
from fastdpo.data.forms.json_text import (
    CONTENT_KEYS,
    ROLE_KEYS,
    conversation_key,
    is_message,
    messages_in,
    turns_in,
)
from fastdpo.data.forms.messages import UNREAD_KEYS
from fastdpo.data.forms.names import IGNORE, KINDS, is_metadata, kinds_by_name, names_by_kind
from fastdpo.data.values import BadRow, Example
from fastdpo.types import PreferenceRow

_READ_KEYS = frozenset((*ROLE_KEYS, *CONTENT_KEYS))
PLAIN_TEXT = "text"  # the column of plain texts, trained unchanged even if they look like JSON


class Cells(Mapping[str, Any]):
    """The cells of a row. Every access is recorded in `read`; `peek` reads a cell without recording it."""

    def __init__(self, example: Example) -> None:
        self._example = example
        self.columns = tuple(example)
        self._kinds = names_by_kind(self.columns)
        self.read: set[str] = set()
        self.has_peeked = False  # if False, the findings hold for every row with these columns

    def __getitem__(self, name: str) -> Any:
        value = self._example[name]
        self.read.add(name)
        return value

    def __contains__(self, name: object) -> bool:
        return name in self._example

    def __iter__(self) -> Iterator[str]:
        return iter(self._example)

    def __len__(self) -> int:
        return len(self._example)

    def peek(self, name: str) -> Any:
        self.has_peeked = True
        return self._example.get(name)

    def column(self, kind: str) -> str | None:
        """The first filled column of a kind; else an empty column of that kind; else None."""
        names = self._kinds[kind]
        if len(names) < 2:
            return names[0] if names else None
        return next((n for n in names if is_filled(self._example[n])), names[0])

    def has(self, *kinds: str) -> bool:
        """Whether there is a column of each of these kinds, filled or not."""
        return all(self._kinds[kind] for kind in kinds)

    def all_filled(self, kind: str) -> list[str]:
        """The filled columns of a kind."""
        return [name for name in self._kinds[kind] if is_filled(self._example[name])]

    def filled(self, kind: str) -> str | None:
        """The first filled column of a kind, or None."""
        return next((name for name in self._kinds[kind] if is_filled(self._example[name])), None)


def is_filled(value: Any) -> bool:
    """Whether a cell holds anything."""
    return value is not None and not (isinstance(value, (str, list, dict, tuple)) and len(value) == 0)


def structured(example: Example) -> tuple[dict[str, Any], dict[str, str]]:
    """The row with messages parsed out of JSON text and objects, and the form in which each such column was written.

    An object {"messages": [...], "tools": [...], ...} is replaced by its messages, its tools become the row's tools,
    and its other keys become columns such as "input.tool_choice".
    """
    row = dict(example)
    written: dict[str, str] = {}
    kinds = kinds_by_name(tuple(row))
    for name, value in example.items():
        if is_too_deep(value):
            raise BadRow(f"{name} is nested more than {MOST_LEVELS} levels deep")
        if name == PLAIN_TEXT or not isinstance(value, (str, list, dict)):
            continue
        kind = kinds.get(name)
        if kind == "tools":
            continue
        found = messages_in(value, name, is_needed=kind is not None)
        if isinstance(value, str):
            if kind in ("history", "context") and isinstance(found, str):
                found = turns_in(value)
            written[name] = "text" if isinstance(found, str) else "JSON"
        inner = conversation_key(found) if kind is not None and isinstance(found, dict) else None
        if inner is not None:
            for key, item in found.items():
                if key != inner:
                    hoisted = key in KINDS["tools"] and not is_filled(row.get("tools"))
                    row["tools" if hoisted else f"{name}.{key}"] = item
            found = messages_in(found[inner], name)
        row[name] = found
    return row, written


def ledger(cells: Cells, row: PreferenceRow, written: Mapping[str, str], ignored: tuple[str, ...]) -> dict[str, str]:
    """Status of each filled column: "text", "JSON" (messages stored as text), or "unread".

    Args:
        ignored: columns to leave unread, whatever they hold.
    Raises:
        ValueError: an unread column holds text or messages.
    """
    result = {name: how for name, how in written.items() if name in cells.read}
    unknown = []
    said: str | None = None
    for name in cells:
        value = cells.peek(name)
        if name in cells.read:
            for key in _unread_keys(value):
                result[f"{name}.{key}"] = "unread"
            continue
        if not is_filled(value):
            continue
        result[name] = "unread"
        texts = list(texts_in(value))
        if not texts or name in ignored or (is_metadata(name, texts) and not _holds_messages(value)):
            continue
        said = _text_of(row) if said is None else said
        if any(text not in said for text in texts):
            unknown.append(name)
    if unknown:
        raise ValueError(_unknown_columns(unknown, cells))
    return result


def columns_text(columns: Mapping[str, str]) -> str:
    """The ledger of a row as one short text, equal for rows with the same ledger."""
    return json.dumps(columns, sort_keys=True) if columns else ""


class ColumnLedger:
    """Collects the column ledgers of all rows of a dataset."""

    def __init__(self) -> None:
        self._unread: dict[str, None] = {}
        self._first: dict[tuple[str, str], int] = {}  # the first row in which a column was text, or JSON

    @property
    def unread(self) -> tuple[str, ...]:
        """The filled columns that were not read."""
        return tuple(self._unread)

    def add(self, text: str, row_of: Callable[[str], int]) -> None:
        """Records the `columns_text` of a row, or of all rows that share it.

        Args:
            row_of: returns the number of the first such row.
        Raises:
            ValueError: a column holds messages as JSON in some rows and other text in others.
        """
        if not text:
            return
        for name, how in json.loads(text).items():
            if how == "unread":
                self._unread[name] = None
                continue
            self._first.setdefault((name, how), row_of(text))
            other = self._first.get((name, "text" if how == "JSON" else "JSON"))
            if other is not None:
                rows = sorted((other, self._first[name, how]))
                raise ValueError(
                    f"dataset must hold messages as JSON text in every row of the column {name!r} or in no row, got"
                    f" both: rows {rows[0]} and {rows[1]} (counted from 0) differ; write all rows in the same form"
                )


def texts_in(value: Any) -> Iterator[str]:
    """Every content text inside a cell, without the names of roles and keys."""
    if isinstance(value, str):
        if value.strip():
            yield value.strip()
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if key not in ("role", "from", "type", *UNREAD_KEYS):
                yield from texts_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from texts_in(item)


def _holds_messages(value: Any) -> bool:
    return is_message(value) or (isinstance(value, list) and any(map(is_message, value)))


def _unread_keys(value: Any) -> Iterable[str]:
    """Keys of the messages inside a cell that are not read."""
    if isinstance(value, dict):
        if value.keys() <= _READ_KEYS:
            return ()
        if is_message(value):
            return [key for key in UNREAD_KEYS if is_filled(value.get(key))]
        return [key for item in value.values() for key in _unread_keys(item)]
    if isinstance(value, list):
        return [key for item in value for key in _unread_keys(item)]
    if isinstance(value, str) and value[:1] in ("[", "{"):
        found = messages_in(value, "", is_needed=False)
        return () if isinstance(found, str) else _unread_keys(found)
    return ()


def _text_of(row: PreferenceRow) -> str:
    parts = [row.prompt, *row.responses]
    return "\0".join(part if isinstance(part, str) else "\0".join(texts_in(part)) for part in parts)


def _unknown_columns(names: list[str], cells: Cells) -> str:
    shown = ", ".join(f"{name!r} ({_shown(cells.peek(name))})" for name in names)
    first = names[0]
    return (
        f"dataset must hold text in known columns only, got the columns {shown}: map them to known names, such as"
        f" --columns prompt={first}, or ignore them with --columns {IGNORE}={','.join(names)} (in Python"
        f" columns={{{IGNORE!r}: {names!r}}})"
    )


def _shown(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 40 else text[:40] + "..."
