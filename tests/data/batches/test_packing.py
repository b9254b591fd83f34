"""Layouts by example: two pairs that can be read, and the shapes that go wrong."""

import pytest
import torch

from fastdpo import PackedBatch, TokenizedGroup, TokenizedPair, pack_pairs, pad_pairs

TWO_PAIRS = [TokenizedPair([1, 2], [3, 4], [5]), TokenizedPair([6], [7], [8, 9])]


def test_two_pairs_are_laid_out_as_the_module_docstring_shows():
    batch = pack_pairs(TWO_PAIRS)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2, 0, 1, 1, 2]]
    assert batch.segments == ((0, 4, 0, 0), (4, 5, 0, 2), (5, 7, 0, 0), (7, 9, 5, 6))
    assert batch.labels.tolist() == [3, 4, 5, 7, 8, 9]
    assert batch.logit_rows.tolist() == [1, 2, 1, 5, 5, 7]
    assert batch.token_rows.tolist() == [0, 1, 2, 3, 4, 5]
    assert batch.cu_seqlens.tolist() == [0, 2, 3, 4, 6]
    assert batch.pairs.tolist() == [[0, 1], [2, 3]]
    assert batch.num_tokens == (4 + 3) + (2 + 3)
    assert batch.group_ends == ((3, 3, 2, 1), (6, 6, 4, 2))
    assert pad_pairs(TWO_PAIRS).group_ends == batch.group_ends
    assert batch.example_ids.tolist() == pad_pairs(TWO_PAIRS).example_ids.tolist() == [0, 0, 1, 1]


def test_without_prefix_sharing_every_sequence_has_its_own_prompt():
    batch = pack_pairs(TWO_PAIRS[:1], prefix_sharing=False)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 1, 2, 5]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert batch.segments == ((0, 4, 0, 0), (4, 7, 0, 0))
    assert batch.logit_rows.tolist() == [1, 2, 5]


def test_response_tokens_that_both_sides_start_with_are_computed_once_and_counted_twice():
    batch = pack_pairs([TokenizedPair([1], [2, 3, 4], [2, 3, 5, 6])])
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6]]
    assert batch.segments == ((0, 4, 0, 0), (4, 6, 0, 3))
    assert batch.labels.tolist() == [2, 3, 4, 5, 6]
    assert batch.logit_rows.tolist() == [0, 1, 2, 2, 4]
    assert batch.token_rows.tolist() == [0, 1, 2, 0, 1, 3, 4]
    assert batch.cu_seqlens.tolist() == [0, 3, 7]
    assert batch.group_ends == ((5, 7, 2, 1),)  # five rows, seven tokens


def test_a_response_that_is_the_start_of_the_other_keeps_one_token_of_its_own():
    batch = pack_pairs([TokenizedPair([1], [2, 3], [2, 3, 4])])
    assert batch.input_ids.tolist() == [[1, 2, 3, 3, 4]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 2, 3]]
    assert batch.cu_seqlens.tolist() == [0, 2, 5]


def test_four_responses_share_one_prompt():
    group = TokenizedGroup([1, 2], [[3], [4], [5, 6], [7]], preferences=[(0, 1), (0, 3), (2, 1)])
    batch = pack_pairs([*TWO_PAIRS[:1], group])
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 6, 7]]
    assert batch.segments[2:] == ((5, 8, 0, 0), (8, 9, 5, 7), (9, 11, 5, 7), (11, 12, 5, 7))
    assert batch.pairs.tolist() == [[0, 1], [2, 3], [2, 5], [4, 3]]
    assert batch.logit_rows.tolist()[3:] == [6, 6, 6, 9, 6]


def test_every_branch_shares_as_much_as_it_can_with_the_first():
    group = TokenizedGroup([1], [[2, 3, 4], [2, 3, 5], [6, 7], [2, 8]], preferences=[(0, 1), (0, 2), (0, 3)])
    batch = pack_pairs([group])
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 3, 1, 2, 2]]
    assert batch.segments == ((0, 4, 0, 0), (4, 5, 0, 3), (5, 7, 0, 1), (7, 8, 0, 2))
    assert batch.labels.tolist() == [2, 3, 4, 5, 6, 7, 8]
    assert batch.logit_rows.tolist() == [0, 1, 2, 2, 0, 5, 1]
    assert batch.token_rows.tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 0, 6]


def test_equal_responses_are_computed_once_and_stay_sequences_with_their_own_masks_and_reference():
    masks = [[True, True], [True], [False, True]]
    group = TokenizedGroup([1], [[2, 3], [4], [2, 3]], masks, [-1.0, -2.0, -3.0], preferences=[(0, 1), (2, 1)])
    batch = pack_pairs([group])
    assert batch.input_ids.tolist() == [[1, 2, 3, 4]]
    assert batch.segments == ((0, 3, 0, 0), (3, 4, 0, 1))
    assert batch.token_rows.tolist() == [0, 1, 2, 1]  # the third sequence counts only the second token of the first
    assert batch.cu_seqlens.tolist() == [0, 2, 3, 4]
    assert batch.pairs.tolist() == [[0, 1], [2, 1]]
    assert batch.ref_logps.tolist() == [-1.0, -2.0, -3.0]
    assert batch.num_tokens == 3 + 2 + 3  # as the three sequences have apart from each other


def test_a_token_that_only_a_later_branch_counts_is_still_scored():
    group = TokenizedGroup([1], [[2, 3, 4], [2, 3, 5]], [[False, False, True], [True, False, True]])
    batch = pack_pairs([group])
    assert batch.labels.tolist() == [2, 4, 5]
    assert batch.token_rows.tolist() == [1, 0, 2]
    assert batch.logit_rows.tolist() == [0, 2, 2]


def test_masked_response_tokens_are_read_but_not_counted():
    group = TokenizedGroup([1], [[2, 3, 4], [5, 6]], loss_masks=[[True, False, True], [False, True]])
    batch = pack_pairs([group])
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5, 6]]
    assert batch.labels.tolist() == [2, 4, 6]
    assert batch.logit_rows.tolist() == [0, 2, 4]
    assert batch.cu_seqlens.tolist() == [0, 2, 3]


def test_two_different_prompts_after_truncation_become_two_unshared_sequences():
    group = TokenizedGroup([], [[1, 2, 3], [2, 9, 8]], loss_masks=[[False, False, True], [False, True, True]])
    batch = pack_pairs([group])
    assert batch.segments == ((0, 3, 0, 0), (3, 6, 0, 0))
    assert batch.labels.tolist() == [3, 9, 8]
    assert batch.logit_rows.tolist() == [1, 3, 4]


def test_the_first_token_of_a_row_without_prompt_has_nothing_to_be_predicted_from():
    batch = pack_pairs([TokenizedPair([], [3, 4], [5, 6])])
    assert batch.labels.tolist() == [4, 6]
    assert batch.cu_seqlens.tolist() == [0, 1, 2]


@pytest.mark.parametrize("build", [pack_pairs, pad_pairs])
def test_every_row_predicts_the_token_that_follows_it_in_its_sequence(build):
    groups = [
        *TWO_PAIRS,
        TokenizedPair([1], [2, 3, 4], [2, 3, 5, 6]),
        TokenizedGroup([1, 2], [[3], [4, 4], [4, 5, 6]], preferences=[(0, 1), (1, 2)]),
    ]
    batch = build(groups)
    flat_ids, flat_positions = batch.input_ids.flatten(), batch.position_ids.flatten()
    sequences = [[*g.prompt_ids, *r] for g in groups for r in g.responses]
    for s, sequence in enumerate(sequences):
        rows = batch.token_rows[batch.cu_seqlens[s] : batch.cu_seqlens[s + 1]]
        sources = batch.logit_rows[rows]
        assert batch.labels[rows].tolist() == sequence[-len(rows) :]
        assert flat_ids[sources].tolist() == sequence[-len(rows) - 1 : -1]
        assert flat_positions[sources].tolist() == list(range(len(sequence) - len(rows) - 1, len(sequence) - 1))


def test_padded_rows_hold_one_sequence_each():
    batch = pad_pairs(TWO_PAIRS, pad_token_id=99)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4], [1, 2, 5, 99], [6, 7, 99, 99], [6, 8, 9, 99]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 0]]
    assert batch.logit_rows.tolist() == [1, 2, 5, 8, 12, 13]
    assert batch.labels.tolist() == [3, 4, 5, 7, 8, 9]
    assert not batch.is_packed


def test_a_batch_survives_the_way_through_a_collator_dict():
    batch = pack_pairs(TWO_PAIRS)
    again = PackedBatch(**batch.asdict())
    assert again.segments == batch.segments
    assert torch.equal(again.labels, batch.labels)
    assert next(iter(batch.asdict())) == "pairs"  # Trainer reads the batch size off the first tensor


def test_reference_logps_travel_only_where_every_group_brings_them():
    with_ref = TokenizedPair([1], [2], [3], ref_logps=[-1.5, -2.5])
    assert pack_pairs([with_ref]).ref_logps.tolist() == [-1.5, -2.5]
    assert pack_pairs([with_ref, TWO_PAIRS[0]]).ref_logps is None


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match="at least one group"):
        pack_pairs([])
    with pytest.raises(ValueError, match="at least one group"):
        pad_pairs([])


def test_groups_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="at least one token"):
        TokenizedPair([1], [], [2])
    with pytest.raises(ValueError, match="two different indices"):
        TokenizedGroup([1], [[2], [3]], preferences=[(0, 2)])
    with pytest.raises(ValueError, match="loss_masks"):
        TokenizedGroup([1], [[2], [3]], loss_masks=[[True], []])
