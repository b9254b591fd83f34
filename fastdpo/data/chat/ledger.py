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
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastdpo.types import Message

THOUGHT_KEYS = ("reasoning_content", "thinking", "reasoning", "thought")
_READ_KEYS = {"role", "content", "tool_calls", "function_call", *THOUGHT_KEYS}
_KINDS = {"system": "system messages", "developer": "system messages", "user": "user messages", "tool": "tool results"}
_SCHEMA_WORDS = ("type", "format", "$schema", "$ref", "$id", "$defs")
_OPENED, _CLOSED = "<think>", "</think>"
_TAGGED = re.compile(r"(\s*<\w+>)(.*\S.*)(</\w+>\s*)", re.DOTALL)
_MOST_SHAPES = 512  # of which a proof is kept; rows of many more shapes are searched alone
_SHOWN = 60  # characters of an example

Visit = Callable[[str, str], str]  # (kind, text) -> what takes its place
Strings = list[tuple[str, str]]  # (kind, text)


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


def inventory(messages: Sequence[Message]) -> tuple[Strings, Any]:
    """The strings of messages in the order of `walk`, and the shape: the messages without them."""
    strings: Strings = []

    def take(kind: str, text: str) -> str:
        strings.append((kind, text))
        return "s"

    shape = []
    for message in messages:
        content = message.get("content")
        if len(message) != 2 or not isinstance(content, str):
            return inventory_of_all(messages)
        shape.append((message["role"], walk_content(message, take)))
    return strings, tuple(shape)


def inventory_of_all(messages: Sequence[Message]) -> tuple[Strings, Any]:
    """As `inventory`, of messages that have thoughts, calls and other fields."""
    strings: Strings = []

    def take(kind: str, text: str) -> str:
        strings.append((kind, text))
        return "s"

    return strings, repr(walk(messages, take, without_others=True))


def inventory_of_tools(tools: Any) -> tuple[Strings, Any]:
    """As `inventory`, of the functions that a row offers."""
    if not tools:
        return [], None
    strings: Strings = []

    def take(kind: str, text: str) -> str:
        strings.append((kind, text))
        return f"s{len(strings)}"  # keys of one object stay apart

    return strings, repr(walk_tools(tools, take))


def walk(messages: Sequence[Message], visit: Visit, *, without_others: bool = False) -> list[Message]:
    """The messages with every string replaced by what `visit` makes of it; roles and ids stay.

    Args:
        without_others: fields that are no content, thoughts or calls become "s".
    """
    replaced = []
    for message in messages:
        new = {key: "s" if without_others and key not in _READ_KEYS else value for key, value in message.items()}
        seen: dict[str, str] = {}
        for key in THOUGHT_KEYS:  # one thought under several names is one string
            value = message.get(key)
            if isinstance(value, str) and value.strip():
                if value not in seen:
                    seen[value] = visit("thoughts", value)
                new[key] = seen[value]
        if isinstance(message.get("content"), str):
            new["content"] = walk_content(message, visit)
        for key in ("tool_calls", "function_call"):
            if message.get(key):
                new[key] = _walk_calls(message[key], visit, without_others)
        replaced.append(new)
    return replaced


def walk_content(message: Message, visit: Visit) -> str:
    """The content of a message; a thought of the assistant's in it is visited apart from what is said."""
    role, content = message["role"], message["content"]
    if not content.strip():
        return content
    if role != "assistant":
        tagged = _TAGGED.fullmatch(content)  # templates look for <tool_response> around what a user says
        before, content, after = tagged.groups() if tagged else ("", content, "")
        return f"{before}{visit(_KINDS.get(role, f'messages of {role}'), content)}{after}"
    if _CLOSED not in content:
        return visit("answers", content)
    before, _, after = content.partition(_CLOSED)
    opening, opened, thought = before.rpartition(_OPENED)
    parts = [(opening, "answers"), (thought, "thoughts"), (after, "answers")]
    opening, thought, after = (visit(kind, part) if part.strip() else part for part, kind in parts)
    return f"{opening}{opened}{thought}{_CLOSED}{after}"


def _walk_calls(value: Any, visit: Visit, without_others: bool) -> Any:
    """Calls with names and arguments replaced, numbers and ids as they are."""
    if isinstance(value, (list, tuple)):
        return [_walk_calls(item, visit, without_others) for item in value]
    if not isinstance(value, Mapping):
        return value
    new: dict[str, Any] = {}
    for key, item in value.items():
        if key in ("name", "arguments", "parameters"):
            new[key] = _walk_data(item, visit)
        elif key == "function":
            new[key] = _walk_calls(item, visit, without_others)
        else:
            new[key] = "s" if without_others and key != "type" else item
    return new


def _walk_data(value: Any, visit: Visit) -> Any:
    if isinstance(value, str):
        return visit("calls", value) if value.strip() else value
    if isinstance(value, Mapping):
        return {(visit("calls", key) if key.strip() else key): _walk_data(item, visit) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_walk_data(item, visit) for item in value]
    return value


def walk_tools(value: Any, visit: Visit, *, names_keys: bool = False) -> Any:
    """Functions with every name and description replaced; the words of JSON schemas stay."""
    if isinstance(value, (list, tuple)):
        return [walk_tools(item, visit) for item in value]
    if isinstance(value, Mapping):
        new: dict[str, Any] = {}
        for key, item in value.items():
            if key in _SCHEMA_WORDS and not names_keys:
                new[key] = item
            else:
                name = visit("tools", key) if names_keys else key
                new[name] = walk_tools(item, visit, names_keys=key == "properties" and not names_keys)
        return new
    if isinstance(value, str):
        return visit("tools", value) if value.strip() else value
    return value


def other_fields(messages: Sequence[Message]) -> list[tuple[str, str]]:
    """Names and values of what else messages say: `name`, `tool_call_id`, ..."""
    found = []
    for message in messages:
        if len(message) > 2:
            found += [(k, v) for k, v in message.items() if k not in _READ_KEYS and isinstance(v, str) and v.strip()]
    return found


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
