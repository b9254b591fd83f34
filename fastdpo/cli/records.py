"""The JSON lines that commands write at their end."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastdpo.files import write_whole


def write_records(path: str | os.PathLike[str], records: Sequence[Mapping[str, Any]]) -> Path:
    """Writes one JSON object per line and returns the path. An incomplete file never appears."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return target
