"""The parser of a command's dataclasses: one option per field, in groups.

transformers.HfArgumentParser makes the options; runs are parsed with them. The import takes seconds, so quick answers
come from `table`, which is generated from this parser; a test keeps the two equal.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser, TrainingArguments

from fastdpo.cli.options.parser import RaisesErrors, ShowsDefaults, TakesCommas
from fastdpo.cli.options.table import CONFIG_HELP, EPILOG, THEIR_REST, usage_of
from fastdpo.cli.options.values import OrNone, bool_or_word, json_list, json_object

LISTS_OF_OBJECTS = ("datasets", "eval_datasets")  # options that are JSON on a command line


class FieldsParser(RaisesErrors, TakesCommas, HfArgumentParser):
    """HfArgumentParser that raises instead of exiting, and accepts lists with commas."""


def fields_parser(
    command: str, dataclass_types: Sequence[type], groups: Mapping[str, str], shown: Sequence[str] | None = None
) -> FieldsParser:
    """The parser of `fastdpo <command>`.

    Args:
        groups: title -> names of its options in order; all other options are shown under "everything else".
        shown: the options listed by --help, for a command that accepts all options of `fastdpo train` but reads some.
    """
    usage = usage_of(command, shown)
    options: dict[str, Any] = {"formatter_class": ShowsDefaults, "epilog": EPILOG, "allow_abbrev": False}
    parser = FieldsParser(dataclass_types, prog=f"fastdpo {command}", usage=usage, **options)
    parser.add_argument("--config", metavar="FILE", help=CONFIG_HELP)
    actions = [action for action in parser._actions if action.dest != "help"]
    kinds = {name: kind for cls in dataclass_types for name, kind in get_type_hints(cls).items()}
    _improve(actions, kinds)
    _mark_lists(actions, kinds)
    _group(parser, actions, groups)
    return parser


def _improve(actions: Sequence[argparse.Action], kinds: Mapping[str, Any]) -> None:
    """Completes HfArgumentParser: a required output_dir, none for numbers, words beside booleans, JSON, help for
    --no_... options."""
    for action in actions:
        if action.dest == "output_dir":
            action.required = True
            action.help = "Folder for checkpoints and the trained model. Required."
        if (action.type in (int, float) and action.default is None) or action.dest == "max_length":
            action.type = OrNone(action.type)  # type: ignore[arg-type]
        if {str, bool} <= set(get_args(kinds.get(action.dest))):  # HfArgumentParser takes booleans only
            action.type = bool_or_word
        if get_origin(action.type) is dict:
            action.type = OrNone(json_object)
        if action.dest in LISTS_OF_OBJECTS:
            action.type = OrNone(json_list)
        if action.option_strings[0].startswith("--no_"):
            action.help = f"Turn off --{action.dest}, which is on by default."
            action.default = argparse.SUPPRESS


def _mark_lists(actions: Sequence[argparse.Action], kinds: Mapping[str, Any]) -> None:
    """Marks options that are text or a list (report_to): one word on a command line, but possibly a list in a file."""
    for action in actions:
        parts = get_args(kinds.get(action.dest))
        if action.nargs is None and any(get_origin(part) is list for part in parts):
            action.takes_list = True  # type: ignore[attr-defined]


def _group(parser: argparse.ArgumentParser, actions: Sequence[argparse.Action], groups: Mapping[str, str]) -> None:
    """Moves the options into groups; argparse itself only groups options when they are added."""
    of_transformers = {f.name for f in fields(TrainingArguments)}
    named = {name: title for title, names in groups.items() for name in names.split()}
    members: dict[str, list[argparse.Action]] = {title: [] for title in groups}
    for action in actions:
        rest = THEIR_REST if action.dest in of_transformers else "everything else of fastdpo"
        members.setdefault(named.get(action.dest, rest), []).append(action)
    order = {name: position for position, name in enumerate(named)}
    parser._action_groups.clear()
    for title, group in members.items():
        if group:
            group.sort(key=lambda action: order.get(action.dest, 0))
            parser.add_argument_group(title)._group_actions.extend(group)
