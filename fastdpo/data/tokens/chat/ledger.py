"""What of a row's messages the chat template has written, and what it has left out.

In: the messages of a conversation, its tools, and the text that the template made of them. Out: the strings that are
not in it, by what they are: thoughts, calls, tools, answers, system messages, ...

Two proofs together, neither of which decodes a token. Every string is looked for in the text of its side. A short one
may stand there by accident, so conversations of each shape (who speaks, and which fields a message has) are rendered
once more, with a word that occurs nowhere else in place of every string: what is missing then is left out of all
conversations of that shape.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastdpo.data.tokens.chat.strings import Strings, inventory, inventory_of_tools, other_fields, walk, walk_tools
from fastdpo.types import Message

_MOST_SHAPES = 512  # of which a proof is kept; rows of many more shapes are searched alone
_SHOWN = 60  # characters of an example


@dataclass(frozen=True)
class Loss:
    """Strings of one kind that a side of a row has lost."""

    kind: str
    example: str


class Stock:
    """What there is in the conversations of a row: the strings of the prompt and its tools, and of each response."""

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
    """Tells what is lost of conversations, and remembers what it found out about their shapes."""

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
        """What the prompt and a response have lost, each kind once, and fields of messages that are not in the text.

        Args:
            number: of the response.
            text: its conversation as the template has rendered it.
            response_start: where in the text the response begins.
            render: renders other messages and tools in the same way; whatever it raises, the shape is not proved.
            key: what else the template was given.
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
    """Whether a string stands in the text from `start` on, but for white space around it; calls and tools also as JSON
    or Python writes them."""
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
