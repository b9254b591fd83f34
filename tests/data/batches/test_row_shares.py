"""The shares of processes that compute one packed row together."""

import pytest
import torch

from fastdpo import TokenizedPair, pack_pairs
from fastdpo.data.batches.packing import pad_pairs
from fastdpo.data.batches.shares import with_shares
from fastdpo.types import PackedBatch

PAIRS = [TokenizedPair([1, 2], [3, 4], [5]), TokenizedPair([6], [7], [8, 9])]  # the row of packing.py, of 9 tokens


def shares(pairs, num_processes):
    found = with_shares(pack_pairs(pairs), num_processes).shares
    return found.order.tolist(), found.ends, found.places.tolist()


def test_every_process_has_the_heads_rows_of_its_tokens():
    # rows 1 2 1 5 5 7 predict the labels: three in tokens 0-2, two in 3-5, one in 6-8
    assert shares(PAIRS, 3) == ([0, 1, 2, 3, 4, 5], (0, 3, 5, 6), [0, 1, 2, 3, 4, 6])


def test_a_row_that_predicts_tokens_of_two_branches_is_with_its_hidden_state():
    # tokens [1 2 3 | 4 5 | 6]: row 2 predicts 4 and 6, row 3 predicts 5
    assert shares([TokenizedPair([1, 2, 3], [4, 5], [6])], 2) == ([0, 2, 1], (0, 2, 3), [0, 2, 1])


def test_a_process_may_have_no_row_of_the_head():
    # eight tokens: rows 4, 5 and 4 are all with the third process
    assert shares([TokenizedPair([1, 2, 3, 4, 5], [6, 7], [8])], 4) == ([0, 1, 2], (0, 0, 0, 3, 3), [6, 7, 8])


def test_one_process_has_no_shares():
    batch = pack_pairs(PAIRS)
    assert with_shares(batch, 1) is batch


def test_shares_are_part_of_the_batch_as_a_dict_and_move_with_it():
    batch = with_shares(pack_pairs(PAIRS), 3)
    again = PackedBatch(**batch.asdict())
    assert again.shares.ends == (0, 3, 5, 6)
    assert torch.equal(again.shares.order, batch.shares.order)
    moved = batch.to("meta").shares
    assert (moved.places.device.type, moved.num_processes, moved.longest) == ("meta", 3, 3)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (pack_pairs(PAIRS), "2 processes can divide, got 9 tokens"),
        (pad_pairs(PAIRS), "2 processes can divide, got a padded batch"),
    ],
)
def test_rows_without_equal_parts_are_refused(batch, message):
    with pytest.raises(ValueError, match=message):
        with_shares(batch, 2)
