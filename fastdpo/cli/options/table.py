"""The options of `fastdpo train` and `fastdpo sft` as a table that loads in milliseconds: for --help, for unknown
names, and for the first check of values and files.

In: options.json in this folder, written by `python -m fastdpo.cli.options.generate` from the dataclasses; a test keeps
them equal. Out: an argparse parser that does not import transformers. If another release of transformers is installed,
its own fields count: fields missing in the table are accepted unchecked, removed fields are not shown, and the run
checks the values.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastdpo.cli.options.installed import release, training_arguments
from fastdpo.cli.options.parser import RaisingParser, ShowsDefaults, TakesCommas
from fastdpo.cli.options.values import OrNone, bool_or_word, json_list, json_object, to_bool

FILE = Path(__file__).with_name("options.json")
CONFIG_HELP = "YAML or JSON file of options. Flags override it."
THEIR_REST = "everything else of transformers.TrainingArguments"
EPILOG = (
    "Options of TRL's scripts and of the alignment-handbook also work (--model_name_or_path, --dataset_name, ...), on"
    " the command line and in FILE: see docs/command_line.md."
)
SHOWN_ALL = "all options of `fastdpo train` are taken, also in FILE; options that are not listed here have no effect"

# The types that `generate` writes for actions; any other type is read as text and checked by the run itself.
KINDS: Mapping[str, Callable[[str], Any]] = {
    "int": int,
    "float": float,
    "bool": to_bool,
    "bool or word": bool_or_word,
    "json object": json_object,
    "json list": json_list,
}


_ANY_WORDS: Mapping[str, Any] = {"nargs": "*"}
_READ_HERE = ("output_dir",)  # of transformers' options, by the first look itself


class TableParser(TakesCommas, RaisingParser):
    """The parser built from the table."""


@functools.cache
def read_table() -> dict[str, Any]:
    """`options` by id, the ids of each command in help order, `former` names, and the release of `transformers`."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def usage_of(command: str, shown: Sequence[str] | None) -> str:
    output = "" if shown else " --output_dir DIR"
    return f"fastdpo {command} --model MODEL --dataset DATASET{output} [--config FILE] [options]"


def table_parser(command: str, shown: Sequence[str] | None = None, *, for_help: bool = False) -> TableParser:
    """The parser of a command; with `shown`, all of `fastdpo train`'s options, of which the command reads these.

    Args:
        for_help: use the table's options, regardless of the installed transformers.
    """
    table = read_table()
    is_other_release = not for_help and release() != table["transformers"]
    parser = TableParser(
        prog=f"fastdpo {command}",
        usage=usage_of(command, shown),
        epilog=EPILOG,
        allow_abbrev=False,
        formatter_class=ShowsDefaults,
    )
    parser._action_groups.clear()
    groups: dict[str, Any] = {}
    installed = training_arguments()
    for key in table["sft" if command == "sft" else "train"]:
        option = table["options"][key]
        if option["of"] == "transformers" and installed is not None and option["name"] not in installed:
            continue
        title = option["group"]
        groups[title] = groups.get(title) or parser.add_argument_group(title)
        is_open = is_other_release and option["of"] == "transformers" and option["name"] not in _READ_HERE
        arguments = _ANY_WORDS if is_open and "action" not in option else _arguments(option)
        action = groups[title].add_argument(*option["flags"], **{**arguments, "dest": option["name"]})
        action.takes_list = option.get("takes_list", False)
    known = {action.dest for action in parser._actions}
    for name in sorted((installed or frozenset()) - known):
        groups[THEIR_REST].add_argument(*_flags(name), nargs="*", help="See transformers.TrainingArguments.")
        groups[THEIR_REST].add_argument(*_flags(f"no_{name}"), action="store_true", help=argparse.SUPPRESS, dest=name)
    if shown is not None:
        show_only(parser, shown)
    return parser


def add_options(parser: Any, names: Sequence[str]) -> None:
    """Adds options of `fastdpo train` to another command's parser or group; those that are not given are left out of
    the namespace."""
    options = read_table()["options"]
    for name in names:
        option, arguments = options[name], _arguments(options[name])
        if arguments["default"] is not None and "Default:" not in arguments["help"]:
            arguments["help"] += f" Default: {arguments['default']}."
        parser.add_argument(*option["flags"], **{**arguments, "default": argparse.SUPPRESS})


def show_only(parser: argparse.ArgumentParser, shown: Sequence[str]) -> None:
    parser.epilog = SHOWN_ALL
    for action in parser._actions:
        if action.dest != "help":
            action.help = action.help if action.dest in shown else argparse.SUPPRESS


def _arguments(option: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `add_argument`."""
    arguments = {"dest": option["name"], "help": option.get("help")}
    if option.get("action") == "store_false":
        return {**arguments, "action": "store_false", "default": argparse.SUPPRESS}
    kind = KINDS.get(option.get("type", "str"), str)
    arguments.update({key: option[key] for key in ("nargs", "const", "choices", "metavar") if key in option})
    default = option.get("default")
    required = {"required": True} if option.get("required") else {}
    return {**arguments, **required, "type": OrNone(kind) if option.get("none") else kind, "default": default}


def _flags(name: str) -> list[str]:
    return list(dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")))
