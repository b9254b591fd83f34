"""JSON Lines files that a run appends to, and that stay readable if the run is killed.

In and out: dicts. Readers skip a line that a kill cut off; the next entry starts on a new line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fastdpo.files import naming, write_whole


def append_lines(path: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """Appends the entries. Creates the file and its folder if necessary. The error of a full disk names the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    with naming(path), path.open("a+b") as file:
        if size := file.seek(0, os.SEEK_END):
            file.seek(size - 1)
        last = file.read(1)  # alone: a long run appends often
        file.write((b"" if last in (b"", b"\n") else b"\n") + lines.encode())


def replace_lines(path: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """Replaces the file at once: a kill leaves the old entries or the new ones. Without entries there is no file."""
    lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    if lines:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lines)
    else:
        path.unlink(missing_ok=True)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines, in order; an empty list if there is no file."""
    found = []
    for line in path.read_bytes().split(b"\n") if path.is_file() else ():
        try:
            found.append(json.loads(line))
        except ValueError:  # not JSON, or cut within a character
            continue
    return found
