"""Puts tiles into a user's model, checked on that model: in the precision of the run, log-probs over tiles are those of
whole rows, and so are the gradients of every kind of module that runs in tiles.

Refuses a model without a module that could, and one whose log-probs change.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastdpo.data.batches.packing import pack_pairs, pad_pairs
from fastdpo.modeling.backbone import bare_model, text_config, text_ids
from fastdpo.modeling.head import execution_device
from fastdpo.modeling.packed import packed_logps
from fastdpo.modeling.tiles.install import Tiles, auto_tile_rows, install_tiles, remove_tiles, tile_rows_of
from fastdpo.modeling.tiles.trial import find_tiles
from fastdpo.types import PackedBatch, TokenizedPair

# Largest difference of a summed log-prob, relative to 1 + its size, that rounding explains
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
_TOLERANCE_IN_16_BIT = 1e-2
_LENGTHS = [(7, 9, 5), (6, 4, 11)]  # tokens of prompt, chosen and rejected
_REMEDY = "gradient_checkpointing and activation_offloading save memory with any model"


def use_tiles(
    model: nn.Module,
    tile_rows: int | str | None,
    *,
    impl: str = "auto",
    is_packed: bool = True,
    router_aux_loss: bool = False,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Tiles | None:
    """Makes the position-wise modules of a prepared model run in tiles, or in none for None.

    Args:
        tile_rows: rows of a tile, or "auto".
        impl, is_packed, router_aux_loss, autocast: as in the run.
    Raises:
        ValueError: no module computes each row from that row alone, or log-probs change.
    """
    bare = bare_model(model)
    remove_tiles(bare)
    if tile_rows is None:
        return None
    device = execution_device(bare)
    batch = _batch(bare, is_packed).to(device)
    was_training = model.training

    def sums() -> Tensor:
        return packed_logps(model, batch, impl=impl, router_aux_loss=router_aux_loss).sequences.sums

    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), autocast():
            model.eval()
            with torch.no_grad():
                expected = sums()  # first, because the first packed batch searches for mixers
            model.train()
            found, mixes = find_tiles(bare, sums, (batch.input_ids.shape[0], batch.input_ids.shape[1]))
            if not any(_has_matrix(bare.get_submodule(name)) for name in found):
                mixing = f" ({', '.join(mixes)} mix rows)" if mixes else ""
                raise ValueError(
                    f"tile_rows must be None for {type(bare).__name__}, got {tile_rows}: no module with a weight matrix"
                    f" computes each row from that row alone and would need less memory in tiles{mixing}; {_REMEDY}"
                )
            model.eval()
            with torch.no_grad():
                tiles = install_tiles(bare, found, _rows(bare, tile_rows, device))
                with tile_rows_of(bare, max(batch.input_ids.numel() // 3, 1)):
                    error = ((sums() - expected).abs() / (1 + expected.abs())).max().item()
            is_16_bit = torch.is_autocast_enabled(device.type)
            dtype = next(bare.parameters()).dtype
            tolerance = _TOLERANCE_IN_16_BIT if is_16_bit else _TOLERANCE.get(dtype, _TOLERANCE_IN_16_BIT)
            if not error <= tolerance:
                remove_tiles(bare)
                raise ValueError(
                    f"tile_rows must be None for {type(bare).__name__}, got {tile_rows}: log-probs over tiles differ by"
                    f" {error:.1e} (rounding explains {tolerance:.0e}); {_REMEDY}"
                )
    finally:
        model.train(was_training)
    return tiles


def _has_matrix(module: nn.Module) -> bool:
    return any(parameter.dim() > 1 for parameter in module.parameters())


def _rows(bare: Any, tile_rows: int | str, device: torch.device) -> int:
    if isinstance(tile_rows, int):
        return tile_rows
    return auto_tile_rows(getattr(text_config(bare), "hidden_size", 0), device.type)


def _batch(bare: Any, is_packed: bool) -> PackedBatch:
    """A few short pairs, with a number of rows that is no dimension of a weight."""
    ids, generator = text_ids(bare), torch.Generator().manual_seed(0)

    def draw(length: int) -> list[int]:
        return ids[torch.randint(len(ids), (length,), generator=generator)].tolist()

    sizes = {size for parameter in bare.parameters() for size in parameter.shape}
    longer = 0
    while True:
        pairs = [TokenizedPair(draw(p), draw(c), draw(r + longer)) for p, c, r in _LENGTHS]
        batch = pack_pairs(pairs) if is_packed else pad_pairs(pairs)
        if batch.input_ids.numel() not in sizes:
            return batch
        longer += 1
