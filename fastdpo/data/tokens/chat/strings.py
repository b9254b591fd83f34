"""The strings in the messages and tools of a row, by kind, and the same messages with replaced strings.

In: messages of rows, functions in the form that templates take. Out: (kind, text) in a fixed order; or the messages
with every string replaced by the result of a function.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastdpo.types import Message

THOUGHT_KEYS = ("reasoning_content", "thinking", "reasoning", "thought")
_READ_KEYS = {"role", "content", "tool_calls", "function_call", *THOUGHT_KEYS}
_KINDS = {"system": "system messages", "developer": "system messages", "user": "user messages", "tool": "tool results"}
_SCHEMA_WORDS = ("type", "format", "$schema", "$ref", "$id", "$defs")
_OPENED, _CLOSED = "<think>", "</think>"
_TAGGED = re.compile(r"(\s*<\w+>)(.*\S.*)(</\w+>\s*)", re.DOTALL)

Visit = Callable[[str, str], str]  # (kind, text) -> replacement
Strings = list[tuple[str, str]]  # (kind, text)


def inventory(messages: Sequence[Message]) -> tuple[Strings, Any]:
    """The strings of messages in the order of `walk`, and the shape: the messages without their strings."""
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
    """Like `inventory`, for messages with thoughts, calls and other fields."""
    strings: Strings = []

    def take(kind: str, text: str) -> str:
        strings.append((kind, text))
        return "s"

    return strings, repr(walk(messages, take, without_others=True))


def inventory_of_tools(tools: Any) -> tuple[Strings, Any]:
    """Like `inventory`, for the functions that a row offers."""
    if not tools:
        return [], None
    strings: Strings = []

    def take(kind: str, text: str) -> str:
        strings.append((kind, text))
        return f"s{len(strings)}"  # keys of one object stay apart

    return strings, repr(walk_tools(tools, take))


def walk(messages: Sequence[Message], visit: Visit, *, without_others: bool = False) -> list[Message]:
    """The messages with every string replaced by the result of `visit`; roles and ids stay.

    Args:
        without_others: fields other than content, thoughts and calls become "s".
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
    """The content of a message; an assistant's thought inside the content is visited separately."""
    role, content = message["role"], message["content"]
    if not content.strip():
        return content
    if role != "assistant":
        tagged = _TAGGED.fullmatch(content)  # templates look for <tool_response> around user content
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
    """Calls with replaced names and arguments; numbers and ids stay."""
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
    """Functions with replaced names and descriptions; the keywords of JSON schemas stay."""
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
    """Names and values of the other message fields: `name`, `tool_call_id`, ..."""
    found = []
    for message in messages:
        if len(message) > 2:
            found += [(k, v) for k, v in message.items() if k not in _READ_KEYS and isinstance(v, str) and v.strip()]
    return found
