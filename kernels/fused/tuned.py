"""Block shapes measured on a GPU, in a JSON file. The file is read only by `use_tuned_blocks`, or at the first launch
if FASTDPO_TUNED_BLOCKS names it.

In: the results of `fastdpo.kernels.tuning`. Out: the fields of a kernel family's blocks, per GPU, Triton release, dtype
and hidden size. A file with other content raises ValueError with its name; entries for other GPUs or releases are
ignored. The vocabulary size is not part of the key: a tile's cost does not depend on it, and forward and backward must
use equal tiles even if only one of them sees the whole vocabulary.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

FORMAT = 1
_BLOCKS = frozenset(("block_t", "block_v", "block_h", "num_warps", "num_stages", "tma", "persistent", "library"))
FAMILIES = {  # and the fields of their blocks
    "forward": _BLOCKS,
    "eager": _BLOCKS,
    "logit_grads": _BLOCKS,
    "products": frozenset(("block_n", "block_k", "num_warps", "num_stages", "tma")),
}


class Key(NamedTuple):
    """The conditions for which blocks were measured."""

    gpu: str
    capability: str  # "9.0"
    triton: str
    dtype: str  # "bfloat16"
    hidden_size: int


VARIABLE = "FASTDPO_TUNED_BLOCKS"  # of the environment: a file that is read at the first launch

Entries = dict[Key, dict[str, dict[str, Any]]]  # fields of each family's blocks
_in_use: Entries = {}
_asked_environment: list[bool] = []  # once there is something in it


def use_tuned_blocks(path: str | Path | None = None) -> int:
    """Makes all further launches use the block shapes tuned for their GPU, if the file has any.

    Args:
        path: file written by `fastdpo.kernels.tuning.tune`; None for default_path().
    Returns:
        Number of keys in the file, for all GPUs.
    Raises:
        ValueError: the file cannot be read, or does not hold tuned blocks.
    """
    entries = load(default_path() if path is None else Path(path))
    _use(entries)
    return len(entries)


def use_default_blocks() -> None:
    """Makes all further launches use the table's block shapes."""
    _use({})


@contextmanager
def blocks_of(entries: Entries) -> Iterator[None]:
    """Context manager in which launches use these blocks, from `load`, or the table's for {}."""
    before = dict(_entries())
    _use(entries)
    try:
        yield
    finally:
        _use(before)


def _use(entries: Entries) -> None:
    _asked_environment[:] = [True]  # a choice in the program overrides the environment
    found = dict(entries)
    _in_use.clear()
    _in_use.update(found)


def _entries() -> Entries:
    if not _asked_environment:
        path = os.environ.get(VARIABLE)
        _use(load(Path(path)) if path else {})
    return _in_use


def tuned_fields(family: str, x: Tensor) -> dict[str, Any] | None:
    """The fields of this family's blocks for operands like `x`, (..., H); None without tuned blocks in use."""
    entries = _entries()
    return entries.get(key_of(x), {}).get(family) if entries else None


def key_of(x: Tensor) -> Key:
    gpu, capability = _device_facts(x.device)
    return Key(gpu, capability, triton.__version__, str(x.dtype).removeprefix("torch."), x.shape[-1])


@lru_cache
def _device_facts(device: torch.device) -> tuple[str, str]:
    if device.type != "cuda":
        return "Triton's interpreter", "0.0"
    major, minor = torch.cuda.get_device_capability(device)
    return torch.cuda.get_device_name(device), f"{major}.{minor}"


def default_path() -> Path:
    """blocks.json in this user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastdpo" / "blocks.json"


def load(path: Path) -> Entries:
    """The entries of a file, by key and family. Raises ValueError with the file's name for other content."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"tuned blocks cannot be read from {path}: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("entries"), list):
        raise ValueError(f"{path} must hold tuned blocks of format {FORMAT}; delete it and tune again")
    entries = {}
    for entry in content["entries"]:
        try:
            key, families = Key(**entry["key"]), entry["blocks"]
            good = all(_is_blocks(family, fields) for family, fields in families.items())
        except (TypeError, KeyError, AttributeError):
            good = False
        if not good:
            raise ValueError(
                f"{path} must hold only tuned block shapes, got {str(entry)[:200]}; delete it and tune again"
            )
        entries[key] = families
    return entries


def _is_blocks(family: str, fields: dict[str, Any]) -> bool:
    return fields.keys() == FAMILIES[family] and all(isinstance(x, int) and x >= 0 for x in fields.values())


def save(path: Path, key: Key, families: dict[str, dict[str, Any]]) -> None:
    """Adds the entry of one key to the file, creating it if necessary; an entry of the same key is replaced."""
    entries = load(path) if path.exists() else {}
    entries[key] = families
    listed = [{"key": key._asdict(), "blocks": blocks} for key, blocks in entries.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")  # a reader sees the old file or the new one
    unfinished.write_text(json.dumps({"format": FORMAT, "entries": listed}, indent=1) + "\n")
    unfinished.replace(path)
