"""Rows longer than max_length or max_prompt_length: cut and counted, left out, or the end of the run."""

import pytest

from fastdpo.data.prepare import prepare_preference_dataset, prepare_sft_dataset
from fastdpo.data.tokens.tokenization import TokenizationSettings

ROWS = [
    {"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [5]},
    {"prompt_ids": [1, 2], "chosen_ids": [3, 4, 6], "rejected_ids": [5]},
    {"prompt_ids": [1, 2], "chosen_ids": [3, 4, 6], "rejected_ids": [5, 6, 7, 8]},
    {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [5, 6, 7]},
]


def prepared(rows, plain_tokenizer, **settings):
    return prepare_preference_dataset(rows, plain_tokenizer, TokenizationSettings(**{"max_length": 4, **settings}))


def test_pairs_of_which_one_side_alone_lost_its_end_are_counted(plain_tokenizer):
    _, report = prepared(ROWS, plain_tokenizer)
    assert (report.num_kept, report.num_truncated, report.num_one_cut) == (4, 3, 2)
    assert report.lines()[1] == "truncated 3 pairs"
    assert report.lines()[2].startswith("in 2 of these, only one side lost its end and its end-of-text token")


def test_where_ends_are_kept_no_side_loses_its_own(plain_tokenizer):
    _, report = prepared(ROWS, plain_tokenizer, truncation_mode="keep_end")
    assert (report.num_truncated, report.num_one_cut) == (3, 0)


def test_long_rows_are_left_out_where_that_is_asked_for_whatever_becomes_of_bad_ones(plain_tokenizer):
    dataset, report = prepared(ROWS, plain_tokenizer, on_long_row="drop", on_bad_row="raise")
    assert len(dataset) == 1
    assert report.dropped == {"longer than max_length": (1, 2, 3)}
    _, report = prepared(ROWS, plain_tokenizer, on_long_row="drop", max_length=None, max_prompt_length=2)
    assert report.num_kept == 4
    with pytest.raises(ValueError, match=r"longer than max_prompt_length \(4: rows 0, 1, 2, 3\)"):
        prepared(ROWS, plain_tokenizer, on_long_row="drop", max_prompt_length=1)


def test_the_first_long_row_stops_where_that_is_asked_for(plain_tokenizer):
    message = r"max_length must be at least 5 .*got 4; .* \(dataset row 1, counted from 0\)"
    with pytest.raises(ValueError, match=message):
        prepared(ROWS, plain_tokenizer, on_long_row="raise")
    assert prepared(ROWS, plain_tokenizer, on_long_row="raise", max_length=6)[1].num_kept == 4


def test_fine_tuning_takes_the_setting_too(plain_tokenizer):
    rows = [{"prompt": "a", "completion": " b"}, {"prompt": "a", "completion": " the cat sat on the mat and the dog"}]
    settings = TokenizationSettings(max_length=6, on_long_row="drop")
    dataset, report = prepare_sft_dataset(rows, plain_tokenizer, settings)
    assert (len(dataset), report.dropped) == (1, {"longer than max_length": (1,)})
