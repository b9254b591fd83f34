"""Translates a command line and its YAML file to our option names, so that a parser only has to convert values.

In: an argparse parser of `fastdpo train` or `sft`, and the words of a command line, which may hold `--config FILE`.
Out: the words to parse. The file's values become the parser's defaults, names of other projects are translated, and
flags override the file. Refused before any heavy import: unknown names (with the nearest), an unreadable file, one
option under two names with different values.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastdpo.cli.options import mixtures, names
from fastdpo.cli.options.values import typed, words_of
from fastdpo.cli.options.yaml_file import read_yaml
from fastdpo.data.sources.loading import SUFFIXES
from fastdpo.data.sources.nearest import nearest_file

# (former names with their values, all values of the source) -> our options, and notes for the user
FormerNames = Callable[[dict[str, Any], dict[str, Any]], tuple[dict[str, Any], list[str]]]
BOOLEANS = ("to_bool", "string_to_bool", "bool_or_word")  # types of argparse's actions: ours, and transformers'


@dataclass
class Words:
    """The words to parse, and notes for the user."""

    argv: list[str]
    notes: list[str] = field(default_factory=list)  # for the user, each shown once


def read(
    parser: argparse.ArgumentParser, argv: Sequence[str], former: Mapping[str, Any], translate: FormerNames | None
) -> Words:
    """Sets the parser's defaults to the values of the YAML file, and returns the words of the command line.

    Args:
        former: former TRL names, as in the table: `instead`, and whether the name `is_translated`.
        translate: translates these names; None skips them, for a first look.
    Raises:
        ValueError: see above.
    """
    actions: dict[str, argparse.Action] = {}
    for action in parser._actions:  # of --x and --no_x, --x
        if action.dest != "help":
            actions.setdefault(action.dest, action)
    reader = _Reader(actions, set(parser._option_string_actions), former, translate)
    words, typed_in = reader.words(argv)
    config = _last(words, "--config")
    in_file = reader.file(config) if config is not None else {}
    parser.set_defaults(**in_file)
    for name in in_file:
        actions[name].required = False
    given = {**in_file, **typed_in}
    _follow_trl(parser, given, reader)
    if "datasets" in given:
        actions["dataset"].required = False
        if reader.came_by.get("dataset") == "dataset_name":
            words = _without(words, "--dataset")
            parser.set_defaults(dataset=None)
            reader.notes.append("dataset_name is ignored because datasets is given, as in TRL")
    return Words(words, reader.notes)


class _Reader:
    """Sorts names into our own, those of other projects, and unknown ones."""

    def __init__(
        self,
        actions: Mapping[str, argparse.Action],
        flags: set[str],
        former: Mapping[str, Any],
        translate: FormerNames | None,
    ) -> None:
        self.actions, self.flags, self.former, self.translate = actions, flags, former, translate
        self.renamed = {theirs: name for theirs, name in names.RENAMED.items() if name in actions}
        self.notes: list[str] = []
        self.came_by: dict[str, str] = {}  # our name -> the name it was given by last

    def words(self, argv: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
        """The words under our names, and their values."""
        kept: list[str] = []
        ours: dict[str, tuple[str, Any]] = {}
        theirs: dict[str, Any] = {}
        for flag, after, is_joined in _by_option(argv):
            name = _plain(flag)
            if flag == "":
                kept += after
            elif flag in self.flags or name in self.renamed:
                flag_here = flag if flag in self.flags else f"--{self.renamed[name]}"
                here = names.value_here(name, typed(after))
                after = after if here == typed(after) else words_of(here)
                kept += [f"{flag_here}={after[0]}", *after[1:]] if is_joined else [flag_here, *after]
                is_off = flag.startswith("--no") and name not in self.actions
                self._note(ours, self._dest(_plain(flag_here)), flag, False if is_off else here)
            elif self._is_off(name):  # of an option that is on by default elsewhere
                kept += [f"--{name.removeprefix('no_')}", "false"]
                self._note(ours, name.removeprefix("no_"), flag, False)
            else:
                self._check_known(name, flag, "option")
                theirs[name] = typed(after)
        for name, (written, value) in self._translated(theirs, ours).items():
            self._note(ours, name, f"--{written}", value)
            kept += [f"--{name}", *words_of(value)]
        return kept, {name: value for name, (_, value) in ours.items()}

    def file(self, path: str) -> dict[str, Any]:
        """The values of a YAML file as defaults of the options; its `env` sets environment variables."""
        ours: dict[str, tuple[str, Any]] = {}
        theirs: dict[str, Any] = {}
        recipe = _mapping(path)
        for key, value in recipe.items():
            name = str(key).replace("-", "_")
            if name == "env":
                _set_environment(value, path)
            elif name in self.actions or name in self.renamed:
                value = names.value_here(name, value)
                self._note(ours, self.renamed.get(name, name), str(key), value, f"config {path}: ")
            else:
                try:
                    self._check_known(name, str(key), "key", f"config {path}: ")
                except ValueError as error:
                    raise ValueError(f"{error}{_whose(recipe, path)}") from None
                theirs[name] = value
        for name, (written, value) in self._translated(theirs, ours).items():
            self._note(ours, name, written, value, f"config {path}: ")
        return {name: self._default(name, value, path) for name, (_, value) in ours.items()}

    def _is_off(self, name: str) -> bool:
        action = self.actions.get(name.removeprefix("no_"))
        return name.startswith("no_") and getattr(getattr(action, "type", None), "__name__", "") in BOOLEANS

    def _dest(self, name: str) -> str:
        return name if name in self.actions or not name.startswith("no_") else name.removeprefix("no_")

    def _note(self, ours: dict[str, tuple[str, Any]], name: str, written: str, value: Any, where: str = "") -> None:
        """Records a value; the same option under another name must have the same value."""
        if name in ours:
            other, before = ours[name]
            if _plain(other) != _plain(written) and str(before) != str(value):
                raise ValueError(
                    f"{where}{name} must not get different values under two names, got {other} {before!r} and"
                    f" {written} {value!r}"
                )
        ours[name] = (written, value)
        self.came_by[name] = _plain(written)

    def _check_known(self, name: str, written: str, kind: str, where: str = "") -> None:
        known = (names.COMPUTED, names.ANSWERED, names.ENVIRONMENT, mixtures.NAMES)
        if any(name in group for group in known):
            return
        if name in self.former:
            if self.former[name]["is_translated"]:
                return
            instead = self.former[name]["instead"]
            raise ValueError(f"{where}{kind} {written!r} was removed; instead, in Python: {instead}")
        plain = name.removeprefix("no_") if name.startswith("no_") else name
        nearest = difflib.get_close_matches(plain, [*self.actions, *self.renamed], n=1)
        prefix = "--" if kind == "option" else ""
        hint = f"; did you mean '{prefix}{nearest[0]}'?" if nearest else ""
        raise ValueError(f"{where}unknown {kind} {written!r}{hint}")

    def _translated(self, theirs: dict[str, Any], ours: dict[str, tuple[str, Any]]) -> dict[str, tuple[str, Any]]:
        """Our options for other projects' names, each with the original name."""
        found: dict[str, tuple[str, Any]] = {}
        for name, value in theirs.items():
            if name in names.COMPUTED:
                found.update({key: (name, new) for key, new in names.COMPUTED[name](value).items()})
            elif name in names.ENVIRONMENT and value is not None:
                os.environ[names.ENVIRONMENT[name]] = str(value)
            elif name in names.ANSWERED:
                refusal = names.refusal(name, value)
                if refusal is not None:
                    raise ValueError(refusal)
        of_mixture = {name: value for name, value in theirs.items() if name in mixtures.NAMES}
        asked_by = next(iter(of_mixture), "")
        found.update({key: (asked_by, new) for key, new in mixtures.as_options(of_mixture).items()})
        former = {name: value for name, value in theirs.items() if name in self.former and name not in names.ANSWERED}
        if former and self.translate is not None:
            more, notes = self.translate(former, {name: value for name, (_, value) in ours.items()})
            for key, new in more.items():  # the translated value replaces the given one
                ours.pop(key, None)
                found[key] = (next(iter(former)), new)
            self.notes += notes
        return found

    def _default(self, name: str, value: Any, path: str) -> Any:
        action = self.actions[name]
        if action.choices is not None and value is False and "no" in action.choices:
            value = "no"  # YAML reads a bare `no` as false
        if action.choices is not None and value is not action.default and value not in action.choices:
            raise ValueError(f"config {path}: {name} must be one of {sorted(action.choices)}, got {value!r}")
        return _as_if_typed(name, value, action)


def _follow_trl(parser: argparse.ArgumentParser, given: Mapping[str, Any], reader: _Reader) -> None:
    """If the data is given by TRL's option names, the rows are those of TRL's script: all rows of the training split,
    and the test split if `eval_strategy` asks for evaluation. A file has no splits."""
    if any(name in given for name in ("eval_dataset", "eval_datasets", "eval_split", "eval_fraction")):
        return
    is_asked = str(given.get("eval_strategy", "no")).lower() not in ("no", "false")
    name = str(given.get("dataset", ""))
    has_splits = reader.came_by.get("dataset") == "dataset_name" and not name.lower().endswith(SUFFIXES)
    if "datasets" in given and not is_asked:
        parser.set_defaults(eval_fraction=0.0)
    elif "datasets" not in given and has_splits:
        parser.set_defaults(**({"eval_split": "test"} if is_asked else {"eval_fraction": 0.0}))


def _by_option(argv: Sequence[str]) -> list[tuple[str, list[str], bool]]:
    """(option, words after it, whether the first one was joined by =); the option "" holds words before any option."""
    found: list[tuple[str, list[str], bool]] = [("", [], False)]
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            option, joined, value = word.partition("=")
            found.append((option, [value] if joined else [], bool(joined)))
        else:
            found[-1][1].append(word)
    return found


def _last(words: Sequence[str], flag: str) -> str | None:
    found = None
    for option, after, _ in _by_option(words):
        if option == flag:
            if not after:
                raise ValueError(f"{flag} must be followed by a file")
            found = after[0]
    return found


def _without(words: Sequence[str], flag: str) -> list[str]:
    kept = []
    for option, after, is_joined in _by_option(words):
        if option != flag and option:
            kept += [f"{option}={after[0]}", *after[1:]] if is_joined else [option, *after]
        elif not option:
            kept += after
    return kept


def _plain(written: str) -> str:
    return written.lstrip("-").replace("-", "_")


def _mapping(path: str) -> dict[Any, Any]:
    if not Path(path).is_file():
        raise ValueError(f"config must be an existing file, got {path!r}{nearest_file(path)}")
    values = read_yaml(path, f"config {path}")
    if not isinstance(values, dict):
        raise ValueError(f"config {path} must hold one option per line as `name: value`, got {type(values).__name__}")
    return values


def _whose(recipe: Mapping[str, Any], path: str) -> str:
    """The end of a message: the migrate command, if the file is another project's recipe."""
    from fastdpo.cli.recipes.kinds import KINDS, recognised

    try:
        kind = recognised(recipe, has_overrides=False)
    except ValueError:
        return ""
    if kind in ("trl", "handbook"):  # whose names are taken as they are
        return ""
    return f" (a recipe of {KINDS[kind][0]}? fastdpo migrate {path} --out run.yaml)"


def _set_environment(variables: Any, path: str) -> None:
    if not isinstance(variables, Mapping) or any(isinstance(value, dict | list) for value in variables.values()):
        raise ValueError(f"config {path}: env must hold one variable per line as `NAME: value`, got {variables!r}")
    os.environ.update({str(name): str(value) for name, value in variables.items()})


def _as_if_typed(name: str, value: Any, action: argparse.Action) -> Any:
    """A YAML value as text of a command line, so that both use the same types and checks."""
    if value is None:
        return None
    if action.nargs in ("+", "*"):
        return _items(name, value, action.type or str)
    if isinstance(value, dict):
        return json.dumps(value)
    if isinstance(value, list):
        if getattr(action.type, "__name__", "") == "json list":
            return json.dumps(value)
        if getattr(action, "takes_list", False):
            return [str(item) for item in value]
        raise ValueError(f"config: {name} must be one value, got {value!r}")
    return str(value)


def _items(name: str, value: Any, kind: Any) -> list[Any]:
    """A list from YAML or a command line with converted items; argparse does not convert the items of defaults."""
    items = value if isinstance(value, list) else [item.strip() for item in str(value).split(",")]
    try:
        return [kind(str(item)) for item in items]
    except ValueError as error:
        raise ValueError(f"config: {name} must be a list of {kind.__name__}, got {value!r}") from error
