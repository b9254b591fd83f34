"""Installs tiles on the modules of a model that a trial found, and removes them.

In: a bare model, and where each module's arguments and outputs hold rows. Out: the same model, whose modules run their
own forward over tiles of rows. Hooks around a module (FSDP's, accelerate's) run once per call, not once per tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fastdpo.modeling.tiles.run import RowLeaves, run_in_tiles

_TILES = "_fastdpo_tiles"  # attribute of a model with tiles
_TILE = "_fastdpo_tile"  # attribute of a module that runs in them
AUTO_TILE_ROWS = {"cuda": 2048}  # large enough that a GPU's matmuls are limited by arithmetic
_AUTO_ELSEWHERE = 512


@dataclass
class Tiles:
    """The modules of one model that run in tiles, by name."""

    tile_rows: int
    rows: dict[str, RowLeaves]

    def describe(self, bare: nn.Module) -> str:
        """'tiles of 2,048 rows: 32 x LlamaMLP, 65 x LlamaRMSNorm'"""
        kinds: dict[str, int] = {}
        for name in self.rows:
            kind = type(bare.get_submodule(name)).__name__
            kinds[kind] = kinds.get(kind, 0) + 1
        counted = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
        return f"tiles of {self.tile_rows:,} rows: {counted}"


@dataclass
class _Tile:
    tiles: Tiles
    rows: RowLeaves
    forward: Callable[..., Any] | None  # of the instance, if it had one


def tiles_of(bare: nn.Module) -> Tiles | None:
    """The tiles of a bare model; None without."""
    found: Tiles | None = bare.__dict__.get(_TILES)
    return found


def auto_tile_rows(hidden_size: int, device_type: str) -> int:
    """Rows of a tile by default: half of the hidden size, and enough to keep the device busy."""
    return max(AUTO_TILE_ROWS.get(device_type, _AUTO_ELSEWHERE), hidden_size // 2 // 64 * 64)


def install_tiles(bare: nn.Module, rows: dict[str, RowLeaves], tile_rows: int) -> Tiles:
    """Makes these modules run in tiles, and no others."""
    remove_tiles(bare)
    tiles = bare.__dict__[_TILES] = Tiles(tile_rows, dict(rows))
    for name, leaves in rows.items():
        module = bare.get_submodule(name)
        module.__dict__[_TILE] = _Tile(tiles, leaves, module.__dict__.get("forward"))
        module.__dict__["forward"] = MethodType(_forward, module)  # a bound method, so that a copy gets its own
    return tiles


def remove_tiles(bare: nn.Module) -> None:
    """Modules run their own forward again."""
    bare.__dict__.pop(_TILES, None)
    for module in bare.modules():
        tile: _Tile | None = module.__dict__.pop(_TILE, None)
        if tile is not None:
            module.__dict__.pop("forward", None)
            if tile.forward is not None:
                module.__dict__["forward"] = tile.forward


@contextmanager
def tile_rows_of(bare: nn.Module, tile_rows: int) -> Iterator[None]:
    """Context manager: the model's tiles have this many rows."""
    tiles = tiles_of(bare)
    assert tiles is not None
    before, tiles.tile_rows = tiles.tile_rows, tile_rows
    try:
        yield
    finally:
        tiles.tile_rows = before


@torch.compiler.disable
def _forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    tile: _Tile = module.__dict__[_TILE]
    if dist.is_available() and dist.is_initialized():
        _check_gathered_once(module)
    forward = tile.forward or type(module).forward.__get__(module)
    return run_in_tiles(module, forward, tile.rows, tile.tiles.tile_rows, args, kwargs)


def _check_gathered_once(module: nn.Module) -> None:
    """Raises:
    ValueError: weights inside the module would be gathered from other processes once per tile.
    """
    from torch.distributed.fsdp import FSDPModule

    for name, inner in module.named_modules():
        by_deepspeed = any(hasattr(parameter, "ds_id") for parameter in inner.parameters(recurse=False))
        if by_deepspeed or (name and isinstance(inner, FSDPModule)):
            how = "DeepSpeed ZeRO-3" if by_deepspeed else f"FSDP2 (a unit of its own: {type(inner).__name__})"
            raise ValueError(
                f"tile_rows must be None if weights inside {type(module).__name__} are sharded by {how}: they would be"
                " gathered once per tile; shard whole decoder layers with FSDP2"
            )
