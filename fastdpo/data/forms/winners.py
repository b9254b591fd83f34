"""Two answers and the winner, as in human comparisons and arena data.

In: `Cells` with two answer columns that differ in their suffix (response_a and response_b, output_1 and output_2), a
prompt unless they are whole conversations, and the winner: a column that names one of them, or a score or flag of each.
Out: a pair. Refused with BadRow: a tie, a winner that is neither of the two.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fastdpo.data.forms.answers import Answer, one_answer, preferred
from fastdpo.data.forms.columns import Cells
from fastdpo.data.forms.context import read_context
from fastdpo.data.forms.json_text import parsed
from fastdpo.data.forms.names import plain_name
from fastdpo.data.forms.rankings import is_number
from fastdpo.data.values import BadRow
from fastdpo.types import Message, PreferenceRow

ANSWERS = (
    *("response", "output", "answer", "completion", "conversation", "messages", "candidate", "generation", "reply"),
    *("model_response", "model_output", "summary", "option"),
)
ENDS = (("a", "b"), ("1", "2"), ("0", "1"), ("left", "right"), ("first", "second"))
WINNERS = (
    *("winner", "label", "labels", "preference", "better", "preferred", "choice", "chosen", "best", "selected"),
    *("better_response", "better_response_id", "preferred_response", "preferred_output", "preferred_answer"),
    *("human_preference", "overall_preference", "winner_id", "verdict"),
)
MEASURES = (  # of each answer: a score, or whether it won
    *("score_{}", "rating_{}", "reward_{}", "votes_{}", "{}_score", "{}_rating", "{}_reward"),
    *("winner_{}", "winner_model_{}", "is_better_{}", "{}_is_better"),
)
TIES = frozenset(("draw", "equal", "same", "both", "neither", "none", "no_preference", "both_bad", "bothbad"))
FIRST = frozenset(("a", "1", "first", "left", "true"))
SECOND = frozenset(("b", "2", "second", "right", "false"))


@dataclass(frozen=True)
class _Two:
    """The columns of two answers, and the suffixes of their names."""

    columns: tuple[str, str]
    ends: tuple[str, str]


def winner(cells: Cells) -> PreferenceRow:
    """The better of two answers first."""
    two = _two_answers(tuple(cells))
    assert two is not None  # the form is recognised by it
    lead = _lead(cells, two)
    turns = _conversations(cells, two)
    answers: list[Answer] = turns or [one_answer(cells[name]) for name in two.columns]
    if lead == 0:
        raise BadRow("a tie between two answers")
    better, worse = answers if lead > 0 else answers[::-1]
    return preferred(read_context(cells, but=("prompt",) if turns else ()), [better], [worse])


def has_winner(cells: Cells) -> bool:
    """Whether there are two answers, and one or two columns that give the winner."""
    two = _two_answers(tuple(cells))
    return two is not None and (_winner_column(cells) is not None or _measures(cells, two) is not None)


@lru_cache(maxsize=256)
def _two_answers(columns: tuple[str, ...]) -> _Two | None:
    by_name = {plain_name(column): column for column in columns}
    for stem in ANSWERS:
        for ends in ENDS:
            for joint in ("_", ""):
                names = [f"{stem}{joint}{end}" for end in ends]
                if all(name in by_name for name in names):
                    return _Two((by_name[names[0]], by_name[names[1]]), ends)
    return None


def _winner_column(cells: Cells) -> str | None:
    by_name = {plain_name(column): column for column in cells}
    return next((by_name[name] for name in WINNERS if name in by_name), None)


def _measures(cells: Cells, two: _Two) -> tuple[str, str] | None:
    """The columns with a score or flag of each answer."""
    by_name = {plain_name(column): column for column in cells}
    for sides in (two.ends, tuple(map(plain_name, two.columns))):
        for pattern in MEASURES:
            names = [pattern.format(side) for side in sides]
            if all(name in by_name for name in names):
                return by_name[names[0]], by_name[names[1]]
    return None


def _lead(cells: Cells, two: _Two) -> float:
    """Positive if the first answer is better, negative if the second is, 0 for a tie."""
    column = _winner_column(cells)
    if column is None:
        measures = _measures(cells, two)
        assert measures is not None
        return _difference([cells[name] for name in measures], cells[measures[0]])
    value = cells[column]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        return _difference(value, value)
    if isinstance(value, bool):
        return 1 if value else -1
    if isinstance(value, str):
        if value.strip().lstrip("-").isdigit():
            return _of_number(int(value), two)
        return _of_name(value, cells, two)
    return _of_number(value, two)


def _difference(values: list[Any], shown: Any) -> float:
    numbers = [float(value) if isinstance(value, bool) else value for value in values]
    if len(numbers) != 2 or not all(map(is_number, numbers)):
        raise BadRow(f"the winner is neither of the two answers: {_short(shown)}")
    return numbers[0] - numbers[1]


def _of_number(value: Any, two: _Two) -> float:
    """1 and 2 are the answers and 0 is a tie, unless the column suffixes count from 0."""
    leads = {0: 1, 1: -1, -1: 0, 2: 0} if two.ends == ("0", "1") else {1: 1, 2: -1, 0: 0}
    if not is_number(value) or value not in leads:
        raise BadRow(f"the winner is neither of the two answers: {_short(value)}")
    return leads[value]


def _of_name(value: str, cells: Cells, two: _Two) -> float:
    """A name: of a column, of its end ("a", "model_a", "[[A]]"), of the model that answered, or the answer itself."""
    name = plain_name(re.sub(r"^\W+|\W+$", "", value))
    for lead, column, end in ((1, two.columns[0], two.ends[0]), (-1, two.columns[1], two.ends[1])):
        others = (cells.peek(f"model_{end}"), cells.peek(column))
        if name in (plain_name(column), end) or value in others:
            return lead
    last = name.rsplit("_", 1)[-1]
    if name.startswith("tie") or name in TIES or last in ("tie", "0"):
        return 0
    if last in FIRST | SECOND:
        return 1 if last in FIRST else -1
    raise BadRow(f"the winner is neither of the two answers: {_short(value)}")


def _conversations(cells: Cells, two: _Two) -> list[Answer]:
    """Both conversations, if prompt and answers are lists of texts, one per turn, as in arenas; else none."""
    asked = cells.column("prompt")
    if asked is None:
        return []
    questions, *sides = (_texts(cells.peek(name)) for name in (asked, *two.columns))
    if not questions or any(len(side) != len(questions) for side in sides):
        return []
    for name in (asked, *two.columns):
        cells[name]  # taken down as read
    conversations: list[Answer] = []
    for side in sides:
        messages: list[Message] = []
        for question, answer in zip(questions, side, strict=True):
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        conversations.append(messages)
    return conversations


def _texts(value: Any) -> list[str]:
    items = parsed(value) if isinstance(value, str) else value
    return items if isinstance(items, list) and all(isinstance(item, str) for item in items) else []


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:40] + "..."
