"""Selects the vocabulary tiles that backward may skip, from the mass of every tile, which is known after forward.

In: the (max, sumexp) partials of every row and tile, and a tolerance. Out: a bit per row block and tile. Tiles are
dropped in order of mass, smallest first, as long as the total loss of each row of the block is within the tolerance; a
tile with a label of the block is never dropped. Nothing is read back to the host.

With `q_t` the dropped mass of row t, at most the tolerance, and g the gradient of the log-probs:

    |error of dH_t| <= |g_t| |logit_scale| q_t max_v |W_v|
    |error of dW|   <= sum_t |g_t| |logit_scale| q_t |h_t|

in the Euclidean norm of a row of dH and the Frobenius norm of dW (softcap's slope is at most 1, and the norm of the
dropped probabilities of a row is at most their sum). Apple's Cut Cross-Entropy (arXiv 2411.09009, section 4.3) skips by
the largest entry of a tile after recomputing its logits; here the total is bounded and the recomputation is saved.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastdpo.ops.head import ALWAYS, TILE_SUMS
from fastdpo.types import IGNORE_INDEX

MAX_ELEMENTS = 2**22  # masses that are sorted at once
_READ = (*TILE_SUMS, *ALWAYS)


def row_order(values: dict[str, Tensor], labels: Tensor) -> Tensor:
    """(T,) int64: the rows from most to least certain, by their largest tile; ignored rows come first.

    One uncertain row keeps the tiles of its whole block, so similar rows share blocks. On a model of a trained LM's
    distribution this kept 62% of 128 x 128 tiles, while blocks of consecutive rows kept 93% (tolerance 2**-7, V =
    128256; benchmarks/bench_skipping.py).
    """
    largest = torch.empty_like(values["logps"])
    step = max(1, MAX_ELEMENTS // values["tile_max"].shape[0])
    for start in range(0, len(labels), step):
        rows = slice(start, start + step)
        largest[rows] = _masses({name: values[name][..., rows] for name in _READ}, labels[rows]).amax(1)
    return largest.masked_fill_(labels == IGNORE_INDEX, torch.inf).argsort(descending=True, stable=True)


def kept_tiles(
    values: dict[str, Tensor],  # "tile_max" and "tile_sumexp", (num_tiles, T); "logps" and the two of lse, (T,)
    labels: Tensor,  # (T,) int64
    order: Tensor,  # (T,) int64: block i takes the rows order[i * block_rows : (i + 1) * block_rows]
    tolerance: float,
    block_rows: int,
    block_vocab: int,
) -> Tensor:
    """(num_row_blocks, num_tiles) bool: True where backward must compute the tile."""
    num_tiles, T = values["tile_max"].shape
    num_blocks = -(-T // block_rows)
    kept = torch.empty(num_blocks, num_tiles, dtype=torch.bool, device=labels.device)
    step = max(1, MAX_ELEMENTS // (block_rows * num_tiles))
    for start in range(0, num_blocks, step):
        stop = min(start + step, num_blocks)
        rows = order[start * block_rows : stop * block_rows]
        mass = _masses({name: values[name][..., rows] for name in _READ}, labels[rows])
        missing = (stop - start) * block_rows - mass.shape[0]
        mass = pad(mass, (0, 0, 0, missing)).view(stop - start, block_rows, num_tiles)
        tile = pad(labels[rows], (0, missing), value=IGNORE_INDEX).view(stop - start, block_rows) // block_vocab
        kept[start:stop] = _kept(mass, tile, tolerance)
    return kept


def _masses(values: dict[str, Tensor], labels: Tensor) -> Tensor:
    """(rows, num_tiles): the probability of each tile; 0 in ignored rows, inf for nan."""
    shifted = (values["tile_max"] - values["lse_whole"]) - values["lse_rest"]
    mass = (shifted.exp_() * values["tile_sumexp"]).masked_fill_(values["logps"].isnan(), torch.inf)
    return mass.nan_to_num_(nan=torch.inf, posinf=torch.inf).masked_fill_(labels == IGNORE_INDEX, 0.0).T


def _kept(mass: Tensor, label_tile: Tensor, tolerance: float) -> Tensor:
    """(blocks, num_tiles) from mass (blocks, rows, num_tiles) and label_tile (blocks, rows), -1 or so for no label."""
    num_tiles = mass.shape[2]
    largest = mass.amax(1)  # (blocks, num_tiles)
    in_range = (label_tile >= 0) & (label_tile < num_tiles)
    has_label = torch.zeros(largest.shape, dtype=torch.int32, device=mass.device)
    has_label.scatter_add_(1, label_tile.clamp(0, num_tiles - 1), in_range.to(torch.int32))
    largest = largest.masked_fill(has_label > 0, torch.inf)
    ordered, order = largest.sort(dim=1, stable=True)
    dropped = mass.gather(2, order[:, None, :].expand_as(mass)).cumsum(2).amax(1)  # (blocks, num_tiles)
    kept = torch.empty_like(has_label, dtype=torch.bool)
    return kept.scatter_(1, order, (dropped > tolerance) | (ordered == torch.inf))
