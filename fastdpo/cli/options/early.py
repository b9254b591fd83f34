"""The first look at a command line: checks that take a second, before torch and transformers are imported.

In: the words of `fastdpo train`, `sft` or `precompute`. Out: argparse's options, or the help. Refuses unknown names,
values of the wrong type, missing files and folders, and an output_dir without write permission. The run parses the
options again with the dataclasses; that result counts.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastdpo.cli.options.reading import read
from fastdpo.cli.options.table import read_table, table_parser
from fastdpo.data.sources.loading import SUFFIXES
from fastdpo.data.sources.nearest import OF_A_MODEL, check_model_folder, nearest_file


def look(command: str, argv: Sequence[str], shown: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, unconverted if only the installed transformers knows their type; prints the help and exits on -h.

    Args:
        shown: the options that a command reads, if it reads only some of `fastdpo train`'s.
    Raises:
        ValueError: an error that the user can fix, with the option to type.
    """
    if "-h" in argv or "--help" in argv:
        table_parser(command, shown, for_help=True).print_help()
        raise SystemExit(0)
    parser = table_parser(command, shown)
    words = read(parser, argv, read_table()["former"], None)
    options, rest = parser.parse_known_args(words.argv)
    if rest:
        raise ValueError(f"every value must follow an option, got {rest[0]!r}")
    check_paths(options, writes=shown is None)
    return options


def check_paths(options: argparse.Namespace, *, writes: bool) -> None:
    """Raises ValueError for missing files and folders, with the nearest existing one."""
    for name in ("dataset", "eval_dataset"):
        check_data(name, getattr(options, name))
    for name in ("datasets", "eval_datasets"):
        for part in getattr(options, name) or ():
            if isinstance(part, dict) and "data_files" not in part and "data_dir" not in part:
                check_data(name, part.get("path", part.get("id")))
    check_model("model", options.model)
    check_model("ref_model", getattr(options, "ref_model", None))
    check_folder("tokenizer", options.tokenizer)
    if writes:
        check_can_write(options.output_dir)


def check_data(name: str, path: Any) -> None:
    if not isinstance(path, str):
        return
    is_path = path.lower().endswith(SUFFIXES) or path.startswith((".", "/", "~"))
    if is_path and not Path(path).expanduser().exists():
        raise ValueError(f"dataset file does not exist: {path} (--{name}){nearest_file(path)}")


def check_folder(name: str, path: Any) -> bool:
    """Whether the folder exists; if not, `path` may still be a name on the Hub."""
    if not isinstance(path, str):
        return False
    check_model_folder(name, path)
    return Path(path).is_dir()


def check_model(name: str, path: Any) -> None:
    if check_folder(name, path) and not any(Path(path, file).is_file() for file in OF_A_MODEL):
        there = sorted(entry.name for entry in Path(path).iterdir())
        models = sorted({file.parent for kind in OF_A_MODEL for file in Path(path).glob(f"*/{kind}")})
        hint = f"; did you mean --{name} {models[-1]}?" if models else ""
        raise ValueError(
            f"{name} must be a folder with a config.json (a model) or an adapter_config.json (an adapter), got {path}"
            f" with {', '.join(there[:8]) or 'nothing'}{hint}"
        )


def check_can_write(output_dir: str) -> None:
    """Raises ValueError if the folder cannot be created or written to."""
    folder = Path(output_dir)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".fastdpo-", dir=there))
    except OSError as error:
        what = "a directory" if there == folder else f"a new directory in {there}"
        raise ValueError(
            f"output_dir must be {what} with write permission, got {output_dir}: {error.strerror}; choose another one:"
            " --output_dir DIR"
        ) from None


def check_output(name: str, path: str | None, *inputs: Any) -> None:
    """Raises ValueError if an output file is a folder or an input, or cannot be written to. None is no file."""
    if path is None:
        return
    target = Path(path).expanduser()
    if target.is_dir():
        raise ValueError(f"{name} must be a file, got the folder {path}")
    if any(isinstance(data, str) and Path(data).expanduser().resolve() == target.resolve() for data in inputs):
        raise ValueError(f"{name} must not be the input file, got {path}")
    folder = target.absolute().parent
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        what = "is a file" if not there.is_dir() else "has no write permission"
        raise ValueError(f"{name} must be a file in a folder with write permission, got {path}: {there} {what}")
