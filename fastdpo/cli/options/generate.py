"""`python -m fastdpo.cli.options.generate` writes options.json, the table of options, from the dataclasses.

Run it after adding or changing a field, with the release of transformers in constraints.txt.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from typing import Any

import transformers

from fastdpo.cli.arguments import GROUPS, TYPES
from fastdpo.cli.options.from_fields import fields_parser
from fastdpo.cli.options.table import FILE
from fastdpo.cli.options.values import OrNone
from fastdpo.training.settings.trl_names import SETTINGS, line_instead

_NAMES_OF_TYPES = {
    "string_to_bool": "bool",
    "bool_or_word": "bool or word",
    "json_object": "json object",
    "json_list": "json list",
}


def make_table() -> dict[str, Any]:
    """The up-to-date table; see `table.read_table`."""
    table: dict[str, Any] = {"transformers": transformers.__version__, "options": {}}
    theirs = {f.name for f in fields(transformers.TrainingArguments)} - _ours()
    for command in ("train", "sft"):
        parser, keys = fields_parser(command, TYPES[command], GROUPS), []
        for group in parser._action_groups:
            for action in group._group_actions:
                option = _entry(action, str(group.title), theirs)
                key = action.option_strings[0].lstrip("-")
                if table["options"].setdefault(key, option) != option:
                    key = f"{key} of {command}"
                    table["options"][key] = option
                keys.append(key)
        table[command] = keys
    table["former"] = {name: _former(name) for name in SETTINGS}
    return table


def _ours() -> set[str]:
    """The options that fastdpo's own classes declare, which exist in every release of transformers."""
    classes = {base for types in TYPES.values() for cls in types for base in cls.__mro__}
    return {name for cls in classes if cls.__module__.startswith("fastdpo.") for name in vars(cls)["__annotations__"]}


def _entry(action: argparse.Action, group: str, theirs: set[str]) -> dict[str, Any]:
    of = "transformers" if action.dest in theirs else "fastdpo"
    entry: dict[str, Any] = {"name": action.dest, "of": of, "flags": list(action.option_strings), "group": group}
    if isinstance(action, argparse._StoreFalseAction):
        return {**entry, "action": "store_false", "help": action.help}
    kind: Any = action.type
    if isinstance(kind, OrNone):
        entry["none"], kind = True, kind.kind
    name = "str" if kind is None or action.choices is not None else getattr(kind, "__name__", "str")
    entry["type"] = _NAMES_OF_TYPES.get(name, name)
    for key in ("nargs", "const", "metavar", "required"):
        if getattr(action, key) not in (None, False):
            entry[key] = getattr(action, key)
    if getattr(action, "takes_list", False):
        entry["takes_list"] = True
    if action.choices is not None:
        entry["choices"] = [str(getattr(choice, "value", choice)) for choice in action.choices]
    return {**entry, "default": action.default, "help": action.help}


def _former(name: str) -> dict[str, Any]:
    """The advice for a former TRL name, and whether it is translated."""
    return {"instead": line_instead(name), "is_translated": SETTINGS[name].becomes is not None}


def as_text(table: dict[str, Any]) -> str:
    """JSON with one option per line, so that a diff shows the changed option."""
    parts = []
    for name, value in table.items():
        if isinstance(value, dict):
            lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(entry)}" for key, entry in value.items())
            parts.append(f" {json.dumps(name)}: {{\n{lines}\n }}")
        else:
            parts.append(f" {json.dumps(name)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    FILE.write_text(as_text(make_table()), encoding="utf-8")
    print(f"wrote {FILE}")
