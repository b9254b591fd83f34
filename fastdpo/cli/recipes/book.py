"""Builds a fastdpo recipe: lines with their origin, and the settings without a counterpart, with reasons.

In: keys and values of another project's recipe, and rules for them. Out: YAML text with a comment on each changed line.
Imports only yaml. The keys are somebody else's: a line break in one must not begin a line of the result.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from fastdpo.data.visible import visible

_WIDTH = 10**6  # a value stays on its line


@dataclass(frozen=True)
class Line:
    """One of our options."""

    name: str
    value: Any
    comment: str  # empty where name and value are those of the recipe


@dataclass
class Book:
    """The recipe so far."""

    lines: dict[str, Line] = field(default_factory=dict)
    lost: list[tuple[str, str]] = field(default_factory=list)  # (the recipe's line, why it has no counterpart)
    environment: dict[str, str] = field(default_factory=dict)
    command: str = "train"

    def put(self, name: str, value: Any, comment: str = "") -> None:
        self.lines[name] = Line(name, value, comment)

    def default(self, name: str, value: Any, whose: str) -> None:
        """Adds a line for a setting that the recipe omits and whose default in its project differs from ours."""
        if name not in self.lines:
            self.put(name, value, f"not in the recipe: {whose}'s default")

    def lose(self, key: str, value: Any, why: str) -> None:
        self.lost.append((f"{key}: {_flow(value)}", why))

    def value(self, name: str, default: Any = None) -> Any:
        return self.lines[name].value if name in self.lines else default


@dataclass(frozen=True)
class Lost:
    """A rule: the key has no counterpart."""

    why: str
    off: tuple[Any, ...] = (None, False)  # values that match fastdpo's behaviour: ignored


Rule = str | Lost | Callable[[Any, Book, Mapping[str, Any]], None]  # another name, or no counterpart, or a function


def if_true(key: str, name: str, value: Any) -> Rule:
    """A rule: if the key has a true value, our option `name` is `value`."""

    def rule(given: Any, book: Book, recipe: Mapping[str, Any]) -> None:
        if given:
            book.put(name, value, f"was {key}: {_flow(given)}")

    return rule


def with_others(value: Any, book: Book, recipe: Mapping[str, Any]) -> None:
    """A rule: another key's rule writes this key's value."""


def follow(recipe: Mapping[str, Any], rules: Mapping[str, Rule], same: set[str], book: Book) -> None:
    """Writes every key of a recipe by its rule, or unchanged if it is in `same`; unknown keys are listed as lost."""
    for key, value in recipe.items():
        rule = rules.get(str(key))
        if rule is None and key in same:
            book.put(str(key), value)
        elif rule is None:
            nearest = difflib.get_close_matches(str(key), [*rules, *same], n=1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            book.lose(str(key), value, f"unknown key{hint}")
        elif isinstance(rule, str):
            if value is not None:
                book.put(rule, value, f"was {key}")
        elif isinstance(rule, Lost):
            if not any(value == off and type(value) is type(off) for off in rule.off):
                book.lose(str(key), value, rule.why)
        else:
            rule(value, book, recipe)


def as_yaml(book: Book, title: str) -> str:
    """The recipe as text: the command that runs it, its lines, and at the end the settings without a counterpart."""
    parts = [f"# {title}\n# fastdpo {book.command} --config THIS_FILE\n\n"]
    if book.environment:
        parts.append(yaml.safe_dump({"env": book.environment}, sort_keys=False))
    for line in book.lines.values():
        text = _block(line.name, line.value)
        comment = f"  # {visible(line.comment)}" if line.comment else ""
        first, newline, rest = text.partition("\n")
        parts.append(first + comment + newline + rest)
    if book.lost:
        parts.append("\n# Without a counterpart here:\n")
        parts += [f"#   {visible(line)}\n#       {visible(why)}\n" for line, why in book.lost]
    return "".join(parts)


def _block(name: str, value: Any) -> str:
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return yaml.safe_dump({name: value}, sort_keys=False, width=_WIDTH)
    return f"{name}: {_flow(value)}\n"


class _OneLine(yaml.SafeDumper):
    """Writes text of several lines in quotes, with escapes for its line breaks."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    has_breaks = text.splitlines() not in ([], [text])
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if has_breaks else None)


_OneLine.add_representer(str, _text)


def _flow(value: Any) -> str:
    options: dict[str, Any] = {"default_flow_style": True, "sort_keys": False, "width": _WIDTH, "allow_unicode": True}
    return yaml.dump(value, Dumper=_OneLine, **options).removesuffix("\n").removesuffix("\n...")


def as_number(value: Any) -> float | None:
    """The number in a value, even if YAML reads it as text (1e-6); None for anything else."""
    if isinstance(value, bool):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
