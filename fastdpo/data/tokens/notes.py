"""Notes about tokenized rows for the report, and their counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from fastdpo.data.sources.arrow import arrow_column

if TYPE_CHECKING:
    from datasets import Dataset

LOST = "lost"  # the chat template leaves out `what` of `side`; with an example
UNKNOWN = "unknown"  # the tokens of `side` do not decode to its text
FIELD = "field"  # the template does not read the field `what` of messages
OPENS = "opens"  # the prompt alone ends in `what`, but not with a response
PLAIN_TEXT = "plain_text"  # text, although the tokenizer has a chat template
SPELLED = "spelled"  # plain text spells out the special token `what`, read as a control token
STAYED = "stayed"  # the tokenizer turns even their separate characters into special tokens
SIDES = ("prompts", "chosen", "rejected", "responses", "")


@dataclass(frozen=True)
class Note:
    """One remark about a row."""

    kind: str
    what: str = ""
    side: str = ""  # "prompts", "chosen", "rejected", "responses"
    example: str = ""

    @property
    def is_loss(self) -> bool:
        return self.kind in (LOST, UNKNOWN)


def as_columns(notes: Sequence[Note]) -> list[dict[str, str]] | None:
    """The notes as a cell of a dataset."""
    return [asdict(note) for note in notes] or None


def note_features() -> Any:
    from datasets import List, Value

    return List({field.name: Value("string") for field in fields(Note)})


def loss_reason(notes: Sequence[Note]) -> str:
    """The reason to drop a row with lost content; equal for all rows that lost the same kinds."""
    kinds = list(dict.fromkeys(note.what for note in notes if note.kind == LOST))
    if kinds:
        return f"the chat template leaves out {' and '.join(kinds)}"
    return "the tokenizer does not know some characters"


class NoteCounts:
    """Notes over the rows of a dataset or a stream, counted."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str, str]] = Counter()  # (kind, what, side)
        self._rows_of_kind: Counter[str] = Counter()
        self._examples: dict[tuple[str, str, str], tuple[int, str]] = {}  # (first row, its example)

    def add(self, row: int, notes: Sequence[Note]) -> None:
        """Adds the notes of a row."""
        for note in notes:
            key = (note.kind, note.what, note.side)
            self._counts[key] += 1
            self._examples.setdefault(key, (row, note.example))
        self._rows_of_kind.update({note.kind for note in notes})

    def num_rows(self, kind: str) -> int:
        """Number of rows with a note of this kind."""
        return self._rows_of_kind[kind]

    def whats(self, kind: str) -> list[str]:
        """The subjects of notes of this kind, most frequent first."""
        total: Counter[str] = Counter()
        for (name, what, _), count in self._counts.items():
            if name == kind:
                total[what] += count
        return [what for what, _ in total.most_common()]

    def sides(self, kind: str, what: str) -> dict[str, int]:
        """Number of rows with such a note, by side."""
        found = {side: count for (k, w, side), count in self._counts.items() if (k, w) == (kind, what)}
        return {side: found[side] for side in SIDES if side in found}

    def example(self, kind: str, what: str) -> tuple[int, str]:
        """A row with such a note and its example; notes on responses come before notes on prompts."""
        sides = self.sides(kind, what)
        side = next((side for side in sides if side != "prompts"), next(iter(sides)))
        return self._examples[kind, what, side]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NoteCounts) and self.__dict__ == other.__dict__


def note_counts(dataset: Dataset) -> NoteCounts:
    """Counts the notes of a prepared dataset with the column `notes`."""
    import pyarrow.compute as pc

    column = arrow_column(dataset, "notes")
    counts = NoteCounts()
    rows = pc.indices_nonzero(column.is_valid())
    for row, cell in zip(rows.to_pylist(), column.take(rows).to_pylist(), strict=True):
        counts.add(row, [Note(**note) for note in cell])
    return counts
