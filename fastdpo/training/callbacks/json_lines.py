"""Files of one JSON object a line that a run adds to as it goes, and that outlive a run which is killed.

In and out: dicts. What a kill cut off is left out when the file is read, and what comes after it begins a new line.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def append_lines(path: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """Writes them at the end; makes the file and its folder where they are not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    last = path.read_bytes()[-1:] if path.is_file() else b""
    lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    with path.open("ab") as file:
        file.write((b"" if last in (b"", b"\n") else b"\n") + lines.encode())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines, in order; none where there is no file."""
    found = []
    for line in path.read_bytes().split(b"\n") if path.is_file() else ():
        try:
            found.append(json.loads(line))
        except ValueError:  # no JSON, or cut within a character
            continue
    return found
