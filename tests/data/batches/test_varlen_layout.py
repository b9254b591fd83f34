"""The index tensors of variable-length attention, on layouts that one can read."""

import torch

from fastdpo import TokenizedGroup, TokenizedPair, pack_pairs
from fastdpo.data.batches.varlen import varlen_layout
from fastdpo.types import PackedBatch

THREE = TokenizedGroup([1, 2], [[3, 4], [5], [6, 7]], preferences=[(0, 1)])


def test_the_keys_of_a_branch_are_its_prefix_and_itself():
    layout = pack_pairs([TokenizedPair([1, 2], [3, 4], [5]), TokenizedPair([6], [7], [8, 9])]).varlen
    assert layout.key_rows.tolist() == [0, 1, 2, 3, 0, 1, 4, 5, 6, 5, 7, 8]
    assert layout.row_keys.tolist() == [0, 4, 1, 5, 2, 3, 6, 7, 9, 8, 10, 11]
    assert layout.row_ends.tolist() == [0, 2, 4, 5, 6, 7, 9, 10, 11, 12]
    assert layout.cu_queries.tolist() == [0, 4, 5, 7, 9]
    assert layout.cu_keys.tolist() == [0, 4, 7, 9, 12]
    assert (layout.max_queries, layout.max_keys) == (4, 4)
    assert layout.cu_queries.dtype == layout.cu_keys.dtype == torch.int32


def test_every_further_branch_copies_its_prefix():
    layout = pack_pairs([THREE, TokenizedPair([10], [11], [12])]).varlen
    assert layout.key_rows.tolist() == [0, 1, 2, 3, 0, 1, 4, 0, 1, 5, 6, 7, 8, 7, 9]
    assert layout.row_keys.tolist() == [0, 4, 7, 1, 5, 8, 2, 3, 6, 9, 10, 11, 13, 12, 14]
    assert layout.row_ends.tolist() == [0, 3, 6, 7, 8, 9, 10, 11, 13, 14, 15]


def test_without_shared_prefixes_rows_and_keys_are_the_same():
    layout = pack_pairs([THREE], prefix_sharing=False).varlen
    assert torch.equal(layout.key_rows, torch.arange(11))
    assert torch.equal(layout.row_keys, layout.key_rows)
    assert torch.equal(layout.row_ends, torch.arange(12))


def test_the_layout_travels_with_the_batch_as_a_dict():
    batch = pack_pairs([THREE])
    as_dict = batch.asdict()
    assert isinstance(as_dict["varlen"], dict)
    assert torch.equal(PackedBatch(**as_dict).varlen.row_ends, batch.varlen.row_ends)
    moved = batch.to("meta")
    assert moved.varlen.key_rows.device.type == moved.input_ids.device.type == "meta"


def test_a_row_without_branches_has_an_empty_layout():
    layout = varlen_layout(())
    assert layout.cu_keys.tolist() == [0]
    assert layout.max_keys == 0
