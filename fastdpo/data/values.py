"""Converts one cell of a dataset to text; defines BadRow for unusable rows and RowFormat for formats."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastdpo.types import PreferenceRow

Example = Mapping[str, Any]


class BadRow(ValueError):
    """An unusable row. `reason` is equal for all rows with the same fault, so that reasons can be counted."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class RowFormat:
    """A known set of columns and the function that reads them. Several releases of one dataset may share a name."""

    name: str  # value of `dataset_format`
    columns: tuple[str, ...]  # the columns that `read` needs
    read: Callable[[Any], PreferenceRow]  # from the row's `Cells`
    signature: tuple[str, ...] = ()  # further columns by which it is recognised without being named
    further: tuple[str, ...] = ()  # columns that its rows may have besides, which nothing has to read
    by_name_only: bool = False
    may_be_transcript: bool = False  # a tokenizer without chat template gets its messages as Human: and Assistant:
    regroup: Callable[[Iterable[Example]], Iterator[Example]] | None = None  # where rows of the file are not prompts
    recognizes: Callable[[Any], bool] | None = None  # in place of `columns`, where those go by several names

    def fits(self, cells: Any) -> bool:
        if self.recognizes is not None:
            return self.recognizes(cells)
        return all(column in cells for column in self.columns)

    def is_unmistakable(self, cells: Any) -> bool:
        return not self.by_name_only and self.fits(cells) and all(column in cells for column in self.signature)

    @property
    def all_columns(self) -> tuple[str, ...]:
        return (*self.columns, *self.signature, *self.further)


def as_text(value: Any, field: str) -> str:
    """`value`, if it is text that can be encoded; JSON's escapes can spell half a surrogate pair, which cannot."""
    if not isinstance(value, str):
        raise BadRow(f"{field} is not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRow(f"{field} is not valid Unicode") from None
    return value


def holds_messages(value: Any) -> bool:
    """Whether `value` is one message or a list of them, rather than text."""
    return isinstance(value, (list, Mapping))


def best_response(preferences: Sequence[Sequence[int]]) -> int:
    """The response with the most wins minus losses, the first one of equals; 0 if no response is compared."""
    lead: dict[int, int] = {}
    for chosen, rejected in preferences:
        lead[chosen] = lead.get(chosen, 0) + 1
        lead[rejected] = lead.get(rejected, 0) - 1
    return max(sorted(lead), key=lambda response: lead[response], default=0)


def common_prefix_length(items: Sequence[Any], other: Sequence[Any]) -> int:
    """Number of shared leading characters, messages or tokens."""
    for position, (a, b) in enumerate(zip(items, other, strict=False)):
        if a != b:
            return position
    return min(len(items), len(other))
