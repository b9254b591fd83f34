"""The work lists of the sparse backward: index lists of the kept tiles, made on the device.

In: `kept`, True where a row block needs a vocabulary tile. Out: `Rounds`. One round fills one workspace. The largest
number of rounds follows from the shapes; the content of each round is known only on the device. Nothing is read back to
the host, and an empty round costs a few launches that return at once.

One side of `kept` is *outer*: all kept tiles of an outer block are in one round, so a sum over them is finished there.
The other side is *inner*: its sums continue over several rounds.

Example: two row blocks, three tiles (outer), four slots, so that a round takes the tiles that begin in its first three:

    kept    [[1, 0, 1],    start  [0, 2, 2, 4]    the kept tiles before each tile, and their number
             [1, 0, 1]]    round  [0, 0, 0]       start // 3: all fits one round
                           slots  [[0, -, 2],     places in the workspace, counted from the round's first
                                   [1, -, 3]]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

VISIT_ROWS = 16  # row blocks between which a tile of weights is shared through L2 before the next tile comes


@dataclass(frozen=True)
class Terms:
    """The terms of each block of one side, in ascending order of the other side; all int32."""

    slots: Tensor  # (num_row_blocks * num_tiles + 1,) where a term's tile is in the workspace; the last one is padding
    blocks: Tensor  # same shape; the term's block on the other side
    bounds: Tensor  # flat; block b of round q has the terms from [q * round_stride + b] to [... + b + end_stride]
    round_stride: int
    end_stride: int
    spans: Tensor  # (num_rounds, 2) the first block with work in this round, and the one after the last


@dataclass(frozen=True)
class Rounds:
    """All tensors int32."""

    num_rounds: int
    num_slots: int  # tiles that the workspace holds
    starts: Tensor  # (num_rounds + 1,), round q computes visits[starts[q]:starts[q + 1]]
    visits: Tensor  # (num_row_blocks * num_tiles,) kept tiles as row_block * num_tiles + tile, in the order to compute
    slots: Tensor  # (num_row_blocks, num_tiles), meaningless where not kept
    rows: Terms  # of the row blocks
    tiles: Terms  # of the vocabulary tiles


def plan_rounds(kept: Tensor, max_slots: int, tiles_outside: bool) -> Rounds:
    """
    Args:
        kept: (num_row_blocks, num_tiles) bool, both at least 1.
        max_slots: size of the workspace in tiles; raised to at least twice the length of the inner side.
        tiles_outside: True: the vocabulary tiles are the outer side; False: the row blocks are.
    """
    outer = kept.T if tiles_outside else kept
    num_outer, num_inner = outer.shape
    num_slots = min(kept.numel(), max(max_slots, 2 * num_inner))
    # An outer block belongs to the round in which it begins, and may exceed the round's end by less than num_inner.
    room = kept.numel() + 1 if num_slots == kept.numel() else num_slots - num_inner + 1
    num_rounds = -(-kept.numel() // room)

    before = _count_before(outer)  # (num_outer * num_inner + 1,)
    start = before[::num_inner]  # (num_outer + 1,)
    round_of = start[:-1] // room  # (num_outer,) never falls
    first = torch.searchsorted(round_of, torch.arange(num_rounds + 1, device=kept.device))  # outer block of each round
    starts = start[first]
    slots = before[:-1].view(outer.shape) - starts[round_of][:, None]

    inner_index = torch.arange(num_inner, device=kept.device) * num_outer
    inner_bounds = _count_before(outer.T)[inner_index + first[:, None]]  # (num_rounds + 1, num_inner)
    has_work = starts[1:] > starts[:-1]
    inner_spans = torch.stack([torch.zeros_like(starts[1:]), has_work * num_inner], dim=1)
    inner = _terms(outer.T, slots.T, inner_bounds, num_inner, num_inner, inner_spans)
    outside = _terms(outer, slots, start, 0, 1, torch.stack([first[:-1], first[1:]], dim=1))

    slots, round_of = (slots.T, round_of[None, :]) if tiles_outside else (slots, round_of[:, None])
    rows, tiles = (inner, outside) if tiles_outside else (outside, inner)
    visits = _visits(kept, round_of.expand_as(kept))
    return Rounds(num_rounds, num_slots, _int32(starts), visits, _int32(slots), rows, tiles)


def _visits(kept: Tensor, round_of: Tensor) -> Tensor:
    """Kept tiles by round, then by group of VISIT_ROWS row blocks, then by tile; both arguments as `kept`."""
    num_row_blocks, num_tiles = kept.shape
    row = torch.arange(num_row_blocks, device=kept.device)[:, None]
    tile = torch.arange(num_tiles, device=kept.device)
    num_groups = -(-num_row_blocks // VISIT_ROWS)
    rank = ((round_of * num_groups + row // VISIT_ROWS) * num_tiles + tile) * VISIT_ROWS + row % VISIT_ROWS
    return _int32(rank.masked_fill(~kept, torch.iinfo(rank.dtype).max).flatten().argsort())


def _terms(side: Tensor, slots: Tensor, bounds: Tensor, round_stride: int, end_stride: int, spans: Tensor) -> Terms:
    """Terms of the blocks that `side`, (blocks, blocks of the other side) bool, has in its rows."""
    order = side.flatten().logical_not().argsort(stable=True)  # kept first
    term_slots, blocks = (_int32(pad(x, (0, 1))) for x in (slots.flatten()[order], order % side.shape[1]))
    return Terms(term_slots, blocks, _int32(bounds.flatten()), round_stride, end_stride, _int32(spans))


def _count_before(side: Tensor) -> Tensor:
    """Number of True values before each element of the flattened tensor, and in total: (numel + 1,) int64."""
    return pad(side.flatten().cumsum(0), (1, 0))


def _int32(x: Tensor) -> Tensor:
    return x.to(torch.int32).contiguous()
