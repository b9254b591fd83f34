"""Records of measurements: read from JSON lines, grouped, and their machine and shape in words."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SHAPE = ("num_tokens", "num_rows", "hidden_size", "vocab_size", "dtype")
MACHINE = ("device", "num_threads")
MEASUREMENT = (*MACHINE, *SHAPE, "pass", "method", "order", "tolerance", "workload", "sweep", "x")  # what makes it one

Record = dict[str, Any]


def read(path: Path) -> list[Record]:
    """The last record of each measurement, in the order of their first ones. A file that is missing is empty."""
    if not path.exists():
        return []
    records = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return list({measurement_of(record): record for record in records}.values())


def measurement_of(record: Record) -> tuple[Any, ...]:
    """Equal for records of the same measurement."""
    return tuple(record.get(key) for key in MEASUREMENT)


def groups(records: Iterable[Record], keys: tuple[str, ...]) -> dict[tuple[Any, ...], list[Record]]:
    found: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        found.setdefault(tuple(record.get(key) for key in keys), []).append(record)
    return found


def shape_of(record: Record) -> str:
    return "T{num_tokens}-R{num_rows}-H{hidden_size}-V{vocab_size}-{dtype}".format(**record)


def machine_of(record: Record) -> str:
    where = f"{record['device']}" if record.get("cuda") else f"{record['device']}, {record['num_threads']} threads"
    versions = {"driver": "driver", "cuda": "CUDA", "torch": "torch", "triton": "Triton", "commit": "commit"}
    return ", ".join([where, *(f"{label} {record[key]}" for key, label in versions.items() if record.get(key))])
