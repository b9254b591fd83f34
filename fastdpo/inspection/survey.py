"""Collects facts about every row, so that checks can compare rows without keeping their texts.

In: a `Source`. Out: a `Survey`: for each usable row the numbers of its prompt and answers (equal for equal texts), its
preferences and its lengths. Prompts are equal if their messages are, apart from blanks at their ends; a text equals one
user message with that text. Answers are equal only to the character.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastdpo.data.forms.columns import ColumnLedger, columns_text
from fastdpo.data.forms.messages import THOUGHT_KEYS
from fastdpo.inspection.source import TOKENIZED, ReadRow
from fastdpo.types import Message

Part = str | Sequence[Message]


@dataclass(frozen=True, slots=True)
class Facts:
    """One usable row."""

    number: int
    prompt: int  # of the survey's prompts
    answers: tuple[int, ...]  # (K,) of the survey's answers
    lengths: tuple[int, ...]  # (K,) of each answer, in the survey's unit
    pairs: tuple[tuple[int, int], ...]  # (better, worse): positions in `answers`
    prompt_length: int
    num_raw: int  # total length of all responses, each with the prompt
    num_shared: int  # the part of it that sharing prompts and common beginnings saves
    has_alike: bool  # a pair differs only in blanks and upper case

    @property
    def edges(self) -> list[tuple[int, int]]:
        """(better, worse) answers of each pair, by the survey's numbers."""
        return [(self.answers[better], self.answers[worse]) for better, worse in self.pairs]


@dataclass
class Survey:
    """All rows of a dataset."""

    num_rows: int = 0
    unit: str = "characters"  # of lengths; "tokens" of tokenized rows
    forms: Counter[str] = field(default_factory=Counter)
    dropped: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))  # reason -> numbers of rows
    rows: list[Facts] = field(default_factory=list)
    prompts: dict[bytes, int] = field(default_factory=dict)
    answers: dict[bytes, int] = field(default_factory=dict)
    columns: ColumnLedger = field(default_factory=ColumnLedger)
    _columns_seen: set[str] = field(default_factory=set)

    @property
    def num_kept(self) -> int:
        return len(self.rows)

    @property
    def num_pairs(self) -> int:
        return sum(len(row.pairs) for row in self.rows)

    def pair_lengths(self) -> tuple[list[int], list[int]]:
        """The lengths of the chosen and of the rejected answer of each pair."""
        pairs = [(row.lengths[better], row.lengths[worse]) for row in self.rows for better, worse in row.pairs]
        return [chosen for chosen, _ in pairs], [rejected for _, rejected in pairs]

    def add(self, read: ReadRow) -> Facts | None:
        """Adds one row; returns None if it is unusable.

        Raises:
            ValueError: a column is text in this row and messages in an earlier one.
        """
        self.num_rows += 1
        if read.row is None:
            self.dropped[read.reason].append(read.number)
            return None
        self.forms[read.form] += 1
        self._add_columns(read)
        facts = self._facts(read)
        self.rows.append(facts)
        return facts

    def _add_columns(self, read: ReadRow) -> None:
        assert read.row is not None
        text = columns_text(read.row.columns)
        if text not in self._columns_seen:
            self._columns_seen.add(text)
            self.columns.add(text, lambda _: read.number)

    def _facts(self, read: ReadRow) -> Facts:
        row = read.row
        assert row is not None
        if read.form == TOKENIZED:
            self.unit = "tokens"
        measure = _num_words if read.form == TOKENIZED else num_characters
        key = prompt_key(row.prompt, read.kwargs)
        prompt = self.prompts.setdefault(key, len(self.prompts))
        numbers = tuple(self.answers.setdefault(_answer_key(a), len(self.answers)) for a in row.responses)
        lengths = tuple(measure(answer) for answer in row.responses)
        prompt_length = measure(row.prompt)
        texts = [text_of(answer) for answer in row.responses]
        shared = sum(prompt_length + _num_common(texts[0], text) for text in texts[1:])
        if read.form == TOKENIZED:
            shared = sum(prompt_length + _num_common(texts[0].split(), text.split()) for text in texts[1:])
        return Facts(
            number=read.number,
            prompt=prompt,
            answers=numbers,
            lengths=lengths,
            pairs=tuple(row.preferences),
            prompt_length=prompt_length,
            num_raw=len(lengths) * prompt_length + sum(lengths),
            num_shared=shared,
            has_alike=any(_are_alike(texts[better], texts[worse]) for better, worse in row.preferences),
        )


def survey_rows(rows: Iterable[ReadRow]) -> Survey:
    """The survey of all rows."""
    survey = Survey()
    for row in rows:
        survey.add(row)
    return survey


def prompt_key(prompt: Part, kwargs: Mapping[str, Any] | None = None) -> bytes:
    """A key that is equal for prompts with equal messages and equal variables of the template, such as tools."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if len(messages) == 1 and not kwargs and messages[0].keys() == {"role", "content"}:  # most
        return _digest(f"{messages[0]['role']}\0{messages[0]['content'].strip()}")
    said = [{**message, "content": message["content"].strip()} for message in messages]
    return _digest(json.dumps([said, kwargs or {}], sort_keys=True, ensure_ascii=False, default=str))


def _answer_key(answer: Part) -> bytes:
    if isinstance(answer, str):
        return _digest(f"assistant\0{answer}")
    if len(answer) == 1 and answer[0].keys() == {"role", "content"}:
        return _digest(f"{answer[0]['role']}\0{answer[0]['content']}")
    return _digest(json.dumps(answer, sort_keys=True, ensure_ascii=False, default=str))


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def text_of(part: Part) -> str:
    """A text for comparing and showing: the text itself, or the messages' contents with their other fields."""
    if isinstance(part, str):
        return part
    return "\n\n".join(_message_text(message) for message in part)


def _message_text(message: Message) -> str:
    more = {key: value for key, value in message.items() if key not in ("role", "content")}
    return message["content"] + (json.dumps(more, ensure_ascii=False, default=str) if more else "")


def num_characters(part: Part) -> int:
    """The number of characters of a text, or of the contents and thoughts of messages."""
    if isinstance(part, str):
        return len(part)
    thoughts = (message[key] for message in part for key in THOUGHT_KEYS if isinstance(message.get(key), str))
    return sum(len(message["content"]) for message in part) + sum(map(len, thoughts))


def _num_words(part: Part) -> int:
    return len(text_of(part).split())


def _are_alike(text: str, other: str) -> bool:
    """Whether two texts differ only in blanks and upper case."""
    words, others = (side.split(None, 1)[:1] for side in (text, other))
    if [word.lower() for word in words] != [word.lower() for word in others]:  # most pairs
        return False
    return text.lower().split() == other.lower().split()


def _num_common(text: Sequence[Any], other: Sequence[Any]) -> int:
    """The number of equal leading characters, by bisection, because a loop over characters would be too slow."""
    low, high = 0, min(len(text), len(other))
    if text[:1] != other[:1]:
        return 0
    while low < high:
        middle = (low + high + 1) // 2
        if text[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
