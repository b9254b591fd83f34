"""Parses messages that an export wrote as text: as JSON in one string, in a list of strings, or inside an object.

In: a cell. Out: the parsed messages, or the unchanged cell. Refused with BadRow: text that looks like messages but
cannot be parsed; the model would learn its brackets and quotes.

Text is read as messages only if all of it is JSON (or Python's notation, from str() and CSV exports) in the shape of
messages. An answer that happens to be other JSON stays text.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

from fastdpo.data.depth import is_too_deep
from fastdpo.data.values import BadRow

ROLE_KEYS = ("role", "from", "speaker", "author", "sender")
CONTENT_KEYS = ("content", "value", "text")
CALL_KEYS = ("tool_calls", "function_call")
CONVERSATION_KEYS = ("messages", "conversations", "conversation")

_QUOTE = r"""\\*['"]"""
_LOOKS_LIKE = re.compile(rf"""\W*{_QUOTE}({"|".join((*ROLE_KEYS, *CONTENT_KEYS, *CONVERSATION_KEYS))}){_QUOTE}\s*:""")
_SPEAKS = re.compile(rf"{_QUOTE}({'|'.join(ROLE_KEYS)}){_QUOTE}\s*:")
_SAYS = re.compile(rf"{_QUOTE}({'|'.join((*CONTENT_KEYS, *CALL_KEYS))}){_QUOTE}\s*:")
_NESTED = 3  # times that JSON may be written into JSON's strings


def parsed(text: str) -> Any:
    """The list or object that `text` spells in JSON or in Python's notation, or None. Nested too deeply, it is text."""
    value: Any = text
    for _ in range(_NESTED):
        start = value.lstrip()[:1]
        if start not in ("[", "{", '"', "'", "("):
            return None
        try:
            value = json.loads(value)
        except RecursionError:
            return None
        except ValueError:
            value = _literal(value)
        if not isinstance(value, str):
            return value if isinstance(value, (list, Mapping)) and not is_too_deep(value) else None
    return None


def messages_in(value: Any, column: str, *, is_needed: bool = True) -> Any:
    """The messages written as text in a cell; else the cell itself.

    Args:
        column: name of the cell in BadRow.
        is_needed: refuse text that looks like messages but cannot be parsed; False for a cell that may stay unread.
    Raises:
        BadRow: the text looks like messages and cannot be parsed.
    """
    if isinstance(value, str):
        start = value.lstrip()[:1]
        if start not in ("[", "{", '"'):
            return value
        structure = parsed(value)
        if structure is not None and _holds_messages(structure):
            return messages_in(structure, column)
        if (
            is_needed
            and structure is None
            and _LOOKS_LIKE.match(value)
            and _SPEAKS.search(value)
            and _SAYS.search(value)
        ):
            raise BadRow(f"{column} looks like messages written as text, but is not valid JSON")
        return value
    if isinstance(value, list) and value and isinstance(value[0], str) and all(isinstance(i, str) for i in value):
        items = [parsed(item) if item.lstrip().startswith("{") else None for item in value]
        return items if all(map(is_message, items)) else value
    return value


def turns_in(text: str) -> Any:
    """The pairs of question and answer written as text, [["Hi?", "Hello!"], ...]; else the text."""
    pairs = parsed(text) if text.lstrip().startswith("[") else None
    if not isinstance(pairs, list):
        return text
    return pairs if all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs) else text


def is_message(value: Any) -> bool:
    """Whether `value` is an object with a role and content."""
    return isinstance(value, dict) and any(key in value for key in ROLE_KEYS) and _has_content(value)


def conversation_key(value: Any) -> str | None:
    """The key under which an object that is not a message holds a conversation."""
    if not isinstance(value, dict) or any(key in value for key in ROLE_KEYS):
        return None
    return next((key for key in CONVERSATION_KEYS if isinstance(value.get(key), (list, str))), None)


def json_list(value: Any, name: str) -> list[Any]:
    """A list of objects, given as a list, as its JSON text, as a list of JSON texts, or as a single object.

    Raises:
        BadRow: the value is something else.
    """
    if isinstance(value, str):
        value = _from_json(value, name)
    items = [value] if isinstance(value, Mapping) else value
    if not isinstance(items, list):
        raise BadRow(f"{name} is not a list")
    return [_from_json(item, name) if isinstance(item, str) else item for item in items]


def _from_json(text: str, name: str) -> Any:
    value = parsed(text)
    if value is None:
        raise BadRow(f"{name} is not JSON")
    return value


def _holds_messages(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(map(is_message, value))
    key = conversation_key(value)
    return is_message(value) if key is None else _holds_messages(_structure(value[key]))


def _structure(value: Any) -> Any:
    return parsed(value) if isinstance(value, str) else value


def _has_content(value: Mapping[str, Any]) -> bool:
    return any(key in value for key in (*CONTENT_KEYS, *CALL_KEYS))


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
