"""Writes JSON Lines files that appear complete or not at all. Files whose name ends in .gz are gzipped."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")

WriteLine = Callable[[Mapping[str, Any]], None]


def check_output(path: str | os.PathLike[str], *inputs: Any, name: str = "out") -> Path:
    """Checks and returns the path of an output file, before any work.

    Raises:
        ValueError: it does not have the suffix of JSON Lines, is a folder, or is one of the input files.
    """
    target = Path(path).expanduser()
    if not target.name.lower().endswith(SUFFIXES):
        raise ValueError(f"{name} must end in one of {', '.join(SUFFIXES)}, got {os.fspath(path)!r}")
    if target.is_dir():
        raise ValueError(f"{name} must be a file, got the folder {os.fspath(path)!r}")
    for data in inputs:
        if isinstance(data, (str, os.PathLike)) and Path(data).expanduser().resolve() == target.resolve():
            raise ValueError(f"{name} must not be the input file, got {os.fspath(path)!r}")
    return target


@contextmanager
def json_lines(*targets: Path) -> Iterator[list[WriteLine]]:
    """Yields, for each file, a function that writes a line to it. After an error or interrupt, no file exists."""
    partials = [target.with_name(f".{target.name}.partial") for target in targets]
    files: list[Any] = []
    try:
        for target, partial in zip(targets, partials, strict=True):
            target.parent.mkdir(parents=True, exist_ok=True)
            opened = gzip.open if target.name.lower().endswith(".gz") else open
            files.append(opened(partial, "wt", encoding="utf-8", newline="\n"))
        yield [_writer(file) for file in files]
        for file in files:
            file.close()
        for target, partial in zip(targets, partials, strict=True):
            partial.replace(target)
    finally:
        for file in files:
            file.close()
        for partial in partials:
            partial.unlink(missing_ok=True)


def _writer(file: Any) -> WriteLine:
    def write(row: Mapping[str, Any]) -> None:
        file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")

    return write
