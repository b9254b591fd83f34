"""What is read off Arrow's columns is what the rows say, also in selections and in tables of several chunks."""

from types import SimpleNamespace

import pytest
from datasets import Dataset, concatenate_datasets

from fastdpo.data.batches.lengths import row_lengths
from fastdpo.data.rows.columns import column_features
from fastdpo.data.sources.arrow import arrow_column
from fastdpo.training.inputs.collator import PackingCollator
from fastdpo.training.memory.largest_batch import largest_microbatch
from fastdpo.training.setup.models import check_lengths, check_token_ids


def dataset_of(rows):
    """A prepared dataset with these (prompt, responses) lengths; the ids of row i are all i."""
    columns = {
        "prompt_ids": [[i] * prompt for i, (prompt, _) in enumerate(rows)],
        "responses": [[[i] * n for n in responses] for i, (_, responses) in enumerate(rows)],
        "ref_logps": [[-1.0] * len(responses) if i else None for i, (_, responses) in enumerate(rows)],
    }
    features = {name: kind for name, kind in column_features().items() if name in columns}
    return Dataset.from_dict(columns, features=type(column_features())(features))


ROWS = [(3, [2, 4]), (1, [1, 1, 7]), (5, [2, 2]), (2, [9, 1])]
WHOLE = dataset_of(ROWS)
CASES = {
    "whole": (WHOLE, [0, 1, 2, 3]),
    "selection": (WHOLE.select([3, 1]), [3, 1]),
    "chunks": (concatenate_datasets([WHOLE, WHOLE.select([0, 2])]), [0, 1, 2, 3, 0, 2]),
    "shuffled": (WHOLE.shuffle(seed=1), None),
}


@pytest.mark.parametrize("name", CASES)
def test_a_column_has_the_rows_that_the_dataset_shows(name):
    dataset, rows = CASES[name]
    assert arrow_column(dataset, "prompt_ids").to_pylist() == list(dataset["prompt_ids"])
    if rows is not None:
        assert [len(ids) for ids in arrow_column(dataset, "prompt_ids").to_pylist()] == [ROWS[i][0] for i in rows]
    assert arrow_column(dataset, "ref_logps").null_count == list(dataset["ref_logps"]).count(None)


@pytest.mark.parametrize("name", CASES)
def test_lengths_are_those_of_the_rows(name):
    dataset = CASES[name][0]
    lengths = row_lengths(dataset)
    assert lengths.prompts.tolist() == [len(ids) for ids in dataset["prompt_ids"]]
    assert lengths.per_row(lengths.responses).tolist() == [sum(map(len, rs)) for rs in dataset["responses"]]
    longest = [len(p) + len(r) for p, rs in zip(dataset["prompt_ids"], dataset["responses"], strict=True) for r in rs]
    assert lengths.sequences.tolist() == longest


def test_checks_look_at_the_selected_rows_only():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=9, n_embd=8, n_layer=1, n_head=2))
    check_lengths(model, WHOLE.select([0, 1, 2]), "train")
    with pytest.raises(ValueError, match="sequence of 11 tokens"):
        check_lengths(model, WHOLE, "train")
    check_token_ids(WHOLE.select([0, 1, 2]), 3, "train")
    with pytest.raises(ValueError, match=r"ids must be in \[0, 3\), the train dataset has 3 in prompt_ids"):
        check_token_ids(WHOLE, 3, "train")


@pytest.mark.parametrize(
    ("is_packed", "sharing", "expected"),
    [
        (True, True, (1 + 9) + (2 + 10) - 1),  # rows 1 and 3, each prompt once, and a token that responses share
        (True, False, (2 * 5 + 4) + (2 * 2 + 10)),  # rows 2 and 3
        (False, True, (2 + 2) * 11),  # rows 1 and 3: four sequences that differ, as long as the longest
    ],
)
def test_the_largest_micro_batch_is_that_of_the_largest_rows(is_packed, sharing, expected):
    settings = {"per_device_train_batch_size": 2, "length_bucketing": False}
    settings |= {"max_tokens_per_microbatch": None, "on_oversized_row": "alone"}
    args = SimpleNamespace(prefix_sharing=sharing, **settings)
    collator = PackingCollator(is_packed=is_packed, prefix_sharing=sharing)
    trainer = SimpleNamespace(train_dataset=WHOLE, args=args, is_packed=is_packed, collator=collator)
    assert largest_microbatch(trainer).num_tokens == expected
