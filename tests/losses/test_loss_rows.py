"""Rows in the form that some losses need."""

import pytest
from datasets import Dataset
from tiny import make_rows, make_tokenizer

from fastdpo import DPOConfig, TokenizedGroup, TokenizedPair, pack_pairs, pad_pairs
from fastdpo.data.batches.microbatches import padded_microbatches
from fastdpo.data.prepare import prepare_preference_dataset
from fastdpo.data.rows.loss_rows import ranking_of, with_shared_parts
from fastdpo.data.values import BadRow
from fastdpo.training.inputs.collator import PackingCollator


def test_a_pair_gets_both_responses_up_to_their_shared_length():
    group = with_shared_parts(TokenizedPair([1, 2], [5, 6, 7], [8]))
    assert group.responses == [[5, 6, 7], [8], [5, 6, 7], [8]]
    assert group.loss_masks == [[True, True, True], [True], [True, False, False], [True]]
    assert group.preferences == ((0, 1),)
    assert with_shared_parts(group) == group


def test_only_counted_tokens_make_up_the_shared_length():
    masks = [[False, True, True, True], [True, False, True, False]]
    group = with_shared_parts(TokenizedGroup([1], [[5, 6, 7, 8], [5, 9, 9, 9]], masks))
    assert group.loss_masks[2:] == [[False, True, True, False], [True, False, True, False]]
    # the first token of a sequence counts for nothing, whatever its mask says
    group = with_shared_parts(TokenizedGroup([], [[5, 6, 7], [5, 9]]))
    assert group.loss_masks == [[False, True, True], [False, True], [False, True, False], [False, True]]


def test_pairs_of_a_group_each_have_a_shared_length_of_their_own():
    group = with_shared_parts(TokenizedGroup([1], [[5, 6, 7], [8, 9], [4]], preferences=((0, 1), (0, 2))))
    assert group.preferences == ((0, 1), (4, 5))
    assert [sum(mask) for mask in group.loss_masks] == [3, 2, 2, 2, 3, 1, 1, 1]


@pytest.mark.parametrize("is_packed", [True, False])
def test_a_batch_takes_other_responses_for_no_shared_parts(is_packed):
    collate = PackingCollator(is_packed=is_packed, shared_parts=True)
    cut = with_shared_parts(TokenizedPair([1, 2], [5, 6, 7], [8]))
    others = TokenizedGroup([3], [[5], [6], [7], [8], [9], [10]])  # six responses, of which two are compared
    assert collate([vars(cut), vars(cut)])["shared_parts"].tolist() == [[2, 3], [6, 7]]
    for rows in ([others], [cut, others], [TokenizedPair([3], [5], [6])], [others, TokenizedPair([4], [5], [6])]):
        with pytest.raises(ValueError, match="ld_alpha must be None for these rows"):
            collate([vars(row) for row in rows])


def test_shared_parts_cost_no_token_and_count_none():
    pair = TokenizedPair([1, 2], [5, 6, 7], [8])
    plain, cut = pack_pairs([pair]), pack_pairs([with_shared_parts(pair)])
    assert cut.input_ids.tolist() == plain.input_ids.tolist()
    assert cut.labels.tolist() == plain.labels.tolist()
    assert cut.num_tokens == plain.num_tokens == 8
    assert cut.cu_seqlens.diff().tolist() == [3, 1, 1, 1]


def test_shared_parts_cost_no_row_of_a_padded_batch_and_no_row_of_the_head():
    pair = TokenizedPair([1, 2], [5, 6, 7], [8])
    plain, cut = pad_pairs([pair]), pad_pairs([with_shared_parts(pair)])
    assert cut.input_ids.tolist() == plain.input_ids.tolist()
    assert cut.labels.tolist() == plain.labels.tolist()
    assert cut.num_tokens == plain.num_tokens == 8
    assert cut.token_rows.tolist() == [0, 1, 2, 3, 0, 3]
    assert padded_microbatches([with_shared_parts(pair)] * 2, 20) == [[0, 1]]  # 2 rows of 5 tokens each


def test_reference_log_probs_of_whole_responses_cannot_be_cut():
    with pytest.raises(ValueError, match=r"ld_alpha must be None .*ref_chosen_logps"):
        with_shared_parts(TokenizedPair([1], [5, 6], [7], ref_logps=[-1.0, -2.0]))


@pytest.mark.parametrize(
    ("preferences", "ranking"),
    [
        ([(0, 1)], [0, 1]),
        ([(1, 0)], [1, 0]),
        ([(0, 1), (1, 2)], [0, 1, 2]),
        ([(2, 0), (2, 1), (0, 1)], [2, 0, 1]),  # every response with every other one
    ],
)
def test_preferences_that_order_all_responses_are_a_ranking(preferences, ranking):
    assert ranking_of(preferences) == ranking


@pytest.mark.parametrize(
    ("preferences", "why"),
    [
        ([(0, 1), (0, 2)], "a tie"),
        ([(0, 1), (2, 3)], "a tie"),
        ([(0, 1), (1, 0)], "contradict each other"),
    ],
)
def test_preferences_that_leave_an_order_open_are_refused(preferences, why):
    with pytest.raises(BadRow, match=why):
        ranking_of(preferences)


def prepared(tmp_path, rows, **settings):
    config = DPOConfig(str(tmp_path), use_cpu=True, **settings)
    return prepare_preference_dataset(rows, make_tokenizer(), config.tokenization_settings())


def test_datasets_are_brought_into_the_form_that_the_loss_reads(tmp_path):
    rows = Dataset.from_list(make_rows(3))
    plain, report = prepared(tmp_path, rows)
    assert [len(row["responses"]) for row in plain] == [2, 2, 2]
    cut, report_of_cut = prepared(tmp_path, rows, ld_alpha=0.5)
    assert [len(row["responses"]) for row in cut] == [4, 4, 4]
    for row in cut:
        lengths = [sum(mask) for mask in row["loss_masks"]]
        assert lengths[2] == lengths[3] == min(lengths[:2])
    assert report_of_cut == report
    again, _ = prepared(tmp_path, cut, ld_alpha=0.5)
    assert again.to_list() == cut.to_list()


def test_rows_that_bring_reference_log_probs_are_named(tmp_path):
    row = {"prompt_ids": [1], "chosen_ids": [5], "rejected_ids": [6, 7]}
    brought = {**row, "ref_chosen_logps": -1.0, "ref_rejected_logps": -2.0}
    with pytest.raises(ValueError, match=r"ld_alpha must be None .* \(dataset row 1, counted from 0\)"):
        prepared(tmp_path, [{**row, "ref_chosen_logps": None, "ref_rejected_logps": None}, brought], ld_alpha=0.5)


def test_tokenized_rows_that_compare_nothing_are_counted(tmp_path):
    row = {"prompt_ids": [1], "responses": [[5], [6]], "preferences": [[0, 1]]}
    alone = {**row, "responses": [[5]], "preferences": []}
    dataset, report = prepared(tmp_path, [row, {**row, "preferences": []}, alone])
    assert len(dataset) == report.num_pairs == 1
    assert report.dropped == {"no response is better than another": (1, 2)}


def test_rows_that_are_no_ranking_are_counted_or_stop_the_run(tmp_path):
    """Scores of three answers: two that are equal leave their order open."""
    rows = [
        {"prompt": "the cat ", "responses": ["sees", "finds", "likes"], "scores": scores}
        for scores in ([1.0, 3.0, 2.0], [1.0, 2.0, 2.0])
    ]
    dataset, report = prepared(tmp_path, rows, loss_type="plackett_luce")
    assert [row["preferences"] for row in dataset] == [[[0, 1], [1, 2]]]
    assert report.num_pairs == 2
    assert report.dropped == {"no ranking: a tie": (1,)}
    assert len(prepared(tmp_path, rows)[0]) == 2
    with pytest.raises(ValueError, match=r"dataset row 1 \(counted from 0\) cannot be used: no ranking: a tie"):
        prepared(tmp_path, rows, loss_type="plackett_luce", on_bad_row="raise")
