"""`fastdpo migrate`: converts a DPO recipe of another project to a fastdpo config.

It reads a YAML or JSON file of TRL, the alignment-handbook, Axolotl, LLaMA-Factory or the original DPO release; for the
last also overrides, `name=value`. It prints the project that it recognizes. It prints the config, or writes it to
--out, with a comment on each line that changed. At the end it lists settings without a counterpart, and why. It refuses
other files. Exit code 1 means that you must fix a line before the recipe runs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fastdpo.cli.options.parser import RaisingParser
from fastdpo.cli.options.reading import read
from fastdpo.cli.options.table import read_table, table_parser
from fastdpo.cli.options.yaml_file import read_yaml
from fastdpo.cli.recipes.book import as_yaml
from fastdpo.cli.recipes.kinds import KINDS, migrated, recognised
from fastdpo.cli.recipes.release import flattened, read_overrides
from fastdpo.data.sources.nearest import nearest_file
from fastdpo.data.visible import visible


def main(argv: list[str]) -> int:
    """Migrates the recipe and reports.

    Raises:
        ValueError: the file is not a recipe of a known project.
    """
    options = _parser().parse_args(argv)
    recipe, overrides, folder = _read(options.recipe)
    recipe = {**flattened(recipe), **overrides} if overrides else recipe
    kind = options.kind or recognised(recipe, bool(overrides))
    book = migrated(kind, recipe, folder)
    title = f"A recipe of {KINDS[kind][0]}, by `fastdpo migrate`."
    text = as_yaml(book, title)
    if options.out is None:
        print(text)
        print(f"recognised as a recipe of {KINDS[kind][0]}", file=sys.stderr)
    else:
        if Path(options.out).exists() and not options.overwrite:
            raise ValueError(f"out must not exist yet, got {options.out}; choose another name, or add --overwrite")
        Path(options.out).write_text(text, encoding="utf-8")
        print(f"recognised as a recipe of {KINDS[kind][0]}; wrote {len(book.lines)} lines to {options.out}")
        for line, why in book.lost:
            print(f"no counterpart: {visible(line)}\n    {visible(why)}")
    to_mend = _to_mend(book.command, text)
    if to_mend is not None:
        print(f"fix this before you run it: {to_mend}", file=sys.stderr)
        return 1
    if options.out is not None:
        print(f"run it: fastdpo {book.command} --config {options.out}")
    return 0


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = RaisingParser(prog="fastdpo migrate", description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("recipe", nargs="+", help="the recipe's file, or overrides of the original release, or both")
    parser.add_argument("--out", metavar="FILE", help="file to write the config to; default: print it")
    parser.add_argument(
        "--kind", choices=list(KINDS), help="the project that the recipe is from; default: recognized by its keys"
    )
    parser.add_argument("--overwrite", action="store_true", help="allow --out to replace a file")
    return parser


def _read(words: list[str]) -> tuple[dict[str, Any], dict[str, Any], Path]:
    """Splits the words into the recipe of the file, the overrides, and the file's folder."""
    files = [word for word in words if "=" not in word or Path(word).is_file()]
    overrides = read_overrides([word for word in words if word not in files])
    if len(files) > 1:
        raise ValueError(f"recipe must be one file and overrides (name=value), got {files}")
    if not files:
        return {}, overrides, Path.cwd()
    path = Path(files[0])
    if not path.is_file():
        raise ValueError(f"recipe must be an existing file, got {files[0]!r}{nearest_file(files[0])}")
    recipe = read_yaml(path, f"recipe {path}")
    if not isinstance(recipe, Mapping):
        raise ValueError(f"recipe {path} must hold one key per line as `name: value`, got {type(recipe).__name__}")
    return dict(recipe), overrides, path.resolve().parent


def _to_mend(command: str, text: str) -> str | None:
    """The error of `fastdpo <command>`'s first look at the recipe, ignoring files; None if it is accepted."""
    parser = table_parser(command)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "recipe.yaml")
        lines = {
            name: value for name, value in yaml.safe_load(text).items() if name != "env"
        }  # which reading would set
        path.write_text(yaml.safe_dump(lines), encoding="utf-8")
        try:
            words = read(parser, ["--config", str(path)], read_table()["former"], None)
            parser.parse_args(words.argv)
        except ValueError as error:
            return str(error).replace(f"config {path}: ", "").partition(" (all options:")[0]
    return None
