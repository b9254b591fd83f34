"""Converts text of a command line to values, and YAML values to such text. Imports only Python's standard library.

The functions are argparse types: text in, a value out, ValueError or ArgumentTypeError for invalid text.
"""

from __future__ import annotations

import json
from argparse import ArgumentTypeError
from collections.abc import Callable
from typing import Any

TRUE, FALSE, NONE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0"), ("none", "null")


class OrNone:
    """A type that also accepts `none`."""

    def __init__(self, kind: Callable[[str], Any]) -> None:
        self.kind = kind
        self.__name__ = getattr(kind, "__name__", "number").replace("_", " ")  # argparse: invalid ... value

    def __call__(self, text: str) -> Any:
        return None if text.lower() in NONE else self.kind(text)


def to_bool(text: str | bool) -> bool:
    """Accepts the booleans of transformers' HfArgumentParser, with its error message."""
    if isinstance(text, bool):
        return text
    if text.lower() not in (*TRUE, *FALSE):
        raise ArgumentTypeError(
            f"Truthy value expected: got {text} but expected one of yes/no, true/false, t/f, y/n, 1/0 (case"
            " insensitive)."
        )
    return text.lower() in TRUE


def bool_or_word(text: str) -> bool | str:
    """A boolean, or a word that means something else, as in include_num_input_tokens_seen."""
    return to_bool(text) if text.lower() in (*TRUE, *FALSE) else text


def json_object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(text)
    return value


def json_list(text: str) -> list[Any]:
    value = json.loads(text)
    if not isinstance(value, list):
        raise ValueError(text)
    return value


def typed(words: list[str]) -> Any:
    """The most likely value of the words after an option, read as YAML; an option without words is true."""
    values = [_one(word) for word in words]
    return True if not values else values[0] if len(values) == 1 else values


def _one(word: str) -> Any:
    if word.lower() in NONE:
        return None
    if word.lower() in ("true", "false"):
        return word.lower() == "true"
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            pass
    if word[:1] in ("{", "["):
        try:
            return json.loads(word)
        except json.JSONDecodeError:
            pass
    return word


def words_of(value: Any) -> list[str]:
    """The words of a command line for a value, one per item of a list."""
    if isinstance(value, list) and not any(isinstance(item, dict | list) for item in value):
        return [str(item) for item in value]
    return [json.dumps(value) if isinstance(value, dict | list | bool) else str(value)]
