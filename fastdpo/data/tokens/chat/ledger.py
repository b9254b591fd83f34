"""Finds the parts of a row's messages that the chat template leaves out.

In: the messages of a conversation, its tools, and the rendered text. Out: the strings missing from the text, by kind:
thoughts, calls, tools, answers, system messages, ...

Two checks, neither of which decodes a token. First, every string is searched in the text of its side. A short string
may occur there by accident, so conversations of each shape (the roles, and the fields of each message) are rendered
once more with a unique word in place of every string: a word that is missing then is left out of all conversations of
that shape.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastdpo.data.tokens.chat.strings import Strings, inventory, inventory_of_tools, other_fields, walk, walk_tools
from fastdpo.types import Message

_MOST_SHAPES = 512  # with a cached check; for further shapes only the search in the text is used
_SHOWN = 60  # characters of an example


@dataclass(frozen=True)
class Loss:
    """Strings of one kind that the template leaves out on one side of a row."""

    kind: str
    example: str


class Stock:
    """The strings in the conversations of a row: those of the prompt and its tools, and those of each response."""

    def __init__(self, wholes: Sequence[Sequence[Message]], num_prompt: int, tools: Any) -> None:
        self.wholes, self.tools = wholes, tools
        offered, shape_of_tools = inventory_of_tools(tools)
        prompt, shape = inventory(wholes[0][:num_prompt])
        self.prompt: Strings = [*offered, *prompt]
        self.shape_of_prompt = (shape, shape_of_tools)
        self.responses = [inventory(whole[num_prompt:]) for whole in wholes]

    def strings(self) -> Iterator[str]:
        for found in (self.prompt, *(strings for strings, _ in self.responses)):
            for _, text in found:
                yield text


class Ledger:
    """Finds the losses of conversations, and caches its findings by shape."""

    def __init__(self) -> None:
        self._lost_of_shape: dict[Any, frozenset[int]] = {}

    def losses(
        self,
        stock: Stock,
        number: int,
        text: str,
        response_start: int,
        render: Callable[[Sequence[Message], Any], str],
        key: Any,
    ) -> tuple[list[Loss], list[Loss], list[str]]:
        """The losses of the prompt and a response, one per kind, and message fields that are missing from the text.

        Args:
            number: number of the response.
            text: its rendered conversation.
            response_start: position in the text where the response begins.
            render: renders other messages and tools with the same arguments; if it raises, the shape is not checked.
            key: the other arguments of the template.
        """
        response, shape_of_response = stock.responses[number]
        shape = (stock.shape_of_prompt, shape_of_response, key)
        missing = self._missing_in(shape, stock.wholes[number], stock.tools, render)
        num_before = len(stock.prompt)
        before = [
            string for i, string in enumerate(stock.prompt) if i in missing or not is_in(string[1], text, 0, string[0])
        ]
        after = [
            string
            for i, string in enumerate(response, start=num_before)
            if i in missing or not is_in(string[1], text, response_start, string[0])
        ]
        fields = [name for name, value in other_fields(stock.wholes[number]) if value not in text]
        return by_kind(before), by_kind(after), fields

    def _missing_in(
        self, shape: Any, messages: Sequence[Message], tools: Any, render: Callable[[Sequence[Message], Any], str]
    ) -> frozenset[int]:
        """The numbers of the strings that the template leaves out of every conversation of this shape."""
        known = self._lost_of_shape.get(shape)
        if known is not None:
            return known
        if len(self._lost_of_shape) >= _MOST_SHAPES:
            return frozenset()
        words: list[str] = []
        same: dict[str, str] = {}  # a property and its place in `required` are one name

        def word() -> str:
            words.append(f"zq{len(words)}qz")
            return words[-1]

        def word_of_tool(kind: str, text: str) -> str:
            if text in same:
                words.append(same[text])
                return same[text]
            return same.setdefault(text, word())

        offered = walk_tools(tools, word_of_tool)
        replaced = walk(messages, lambda kind, text: word())
        try:
            text = render(replaced, offered)
        except Exception:  # a template that wants more than words, as dates: each row is then searched alone
            missing: frozenset[int] = frozenset()
        else:
            missing = frozenset(number for number, name in enumerate(words) if name not in text)
        self._lost_of_shape[shape] = missing
        return missing


def by_kind(strings: Strings) -> list[Loss]:
    """One loss for every kind, with the first string as its example."""
    first: dict[str, str] = {}
    for kind, text in strings:
        first.setdefault(kind, text)
    return [Loss(kind, shown(text)) for kind, text in first.items()]


def shown(text: str) -> str:
    """The start of a text, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else line[:_SHOWN] + "..."


def is_in(string: str, text: str, start: int, kind: str) -> bool:
    """Whether the text contains a string from `start` on, ignoring surrounding white space; calls and tools may also be
    written as JSON or Python does."""
    wanted = string.strip()
    if text.find(wanted, start) >= 0:
        return True
    if kind not in ("calls", "tools"):
        return False
    escaped = (json.dumps(wanted, ensure_ascii=False)[1:-1], json.dumps(wanted)[1:-1], repr(wanted)[1:-1])
    if any(text.find(form, start) >= 0 for form in escaped):
        return True
    if kind == "calls" and wanted[:1] in "{[":  # arguments as JSON text, which the template has written anew
        try:
            arguments = json.loads(wanted)
        except json.JSONDecodeError:
            return False
        return all(is_in(leaf, text, start, "tools") for leaf in _leaves(arguments))
    return False


def _leaves(value: Any) -> list[str]:
    """The keys and values of JSON, as text."""
    if isinstance(value, Mapping):
        return [*map(str, value), *(leaf for item in value.values() for leaf in _leaves(item))]
    if isinstance(value, list):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value if isinstance(value, str) else json.dumps(value)]
