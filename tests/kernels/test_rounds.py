"""Which tile the sparse backward computes when, and where in the workspace it lies."""

import pytest
import torch
from covering import every_pair
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from fastdpo.kernels.rounds import plan_rounds

SHAPES = [(1, 1), (5, 1), (1, 6), (3, 4), (7, 5), (35, 9)]


def follow(rounds, num_row_blocks, num_tiles):
    """What the kernels do, on lists: what each row block and each vocabulary tile sums over, in that order."""
    by_row = [[] for _ in range(num_row_blocks)]
    by_tile = [[] for _ in range(num_tiles)]
    for q in range(rounds.num_rounds):
        held = {}  # slot -> (row block, tile)
        for place in rounds.visits[rounds.starts[q] : rounds.starts[q + 1]].tolist():
            row_block, tile = divmod(place, num_tiles)
            slot = int(rounds.slots[row_block, tile])
            assert 0 <= slot < rounds.num_slots
            assert slot not in held
            held[slot] = (row_block, tile)
        for terms, found, own in ((rounds.rows, by_row, 0), (rounds.tiles, by_tile, 1)):
            used = []
            for block in range(*terms.spans[q].tolist()):
                bounds = terms.bounds[q * terms.round_stride + block :]
                for term in range(int(bounds[0]), int(bounds[terms.end_stride])):
                    kept = held[int(terms.slots[term])]
                    assert (kept[own], kept[1 - own]) == (block, int(terms.blocks[term]))
                    found[block].append(kept[1 - own])
                    used.append(kept)
            assert sorted(used) == sorted(held.values())  # every tile of the round is multiplied once on either side
    return by_row, by_tile


@pytest.mark.parametrize(
    *every_pair(share=[0.0, 0.3, 1.0], shape=SHAPES, max_slots=[1, 20, 10**6], tiles_outside=[True, False]), ids=str
)
def test_every_kept_tile_is_computed_once_and_summed_once_on_either_side(shape, share, max_slots, tiles_outside):
    kept = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < share
    rounds = plan_rounds(kept, max_slots, tiles_outside)
    by_row, by_tile = follow(rounds, *shape)
    assert by_row == [row.nonzero()[:, 0].tolist() for row in kept]
    assert by_tile == [column.nonzero()[:, 0].tolist() for column in kept.T]


@pytest.mark.parametrize("tiles_outside", [True, False], ids=["tiles outside", "rows outside"])
def test_a_block_of_the_outer_side_is_finished_in_one_round_also_without_tiles(tiles_outside):
    kept = torch.rand((9, 35), generator=torch.Generator().manual_seed(1)) < 0.4
    kept[4], kept[:, 17] = False, False
    rounds = plan_rounds(kept, 1, tiles_outside)
    assert rounds.num_rounds > 3
    spans = (rounds.tiles if tiles_outside else rounds.rows).spans.tolist()
    assert [block for first, end in spans for block in range(first, end)] == list(range(kept.shape[int(tiles_outside)]))


def test_the_workspace_keeps_its_bound():
    kept = torch.ones(40, 30, dtype=torch.bool)
    assert plan_rounds(kept, 200, True).num_slots == 200
    assert plan_rounds(kept, 7, True).num_slots == 2 * 40
    assert plan_rounds(kept, 7, False).num_slots == 2 * 30
    assert plan_rounds(kept, 10**9, True).num_slots == 40 * 30


def test_row_blocks_of_a_group_are_visited_together():
    rounds = plan_rounds(torch.ones(40, 3, dtype=torch.bool), 10**6, True)
    row_blocks, tiles = rounds.visits // 3, rounds.visits % 3
    assert row_blocks[:48].tolist() == list(range(16)) * 3
    assert tiles[:48].tolist() == [0] * 16 + [1] * 16 + [2] * 16
    assert row_blocks[-8:].tolist() == list(range(32, 40))


def test_planning_reads_no_value_back():
    with FakeTensorMode():  # has shapes and no values: reading one is an error
        rounds = plan_rounds(torch.empty((40, 30), dtype=torch.bool), 100, True)
        with pytest.raises(DataDependentOutputException):
            rounds.starts[1].item()
