"""Several sets of data as one: their order, their shares, their columns, and streams of them."""

import json

import pytest
from datasets import Dataset
from tiny import make_rows

from fastdpo.data.mixture import load_mixture
from fastdpo.data.sources.loading import ROW_JSON, raw_example


def save(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def sets(tmp_path):
    """Files of 10, 6 and 4 rows, whose prompts are numbered."""
    paths = {}
    for name, num_rows in (("ten", 10), ("six", 6), ("four", 4)):
        rows = [{"prompt": f"{name}{i}", "chosen": "good", "rejected": "bad"} for i in range(num_rows)]
        paths[name] = save(tmp_path / f"{name}.jsonl", rows)
    return paths


def prompts(dataset):
    return [raw_example(row)["prompt"] for row in dataset]


def test_sets_stand_one_behind_the_other(sets):
    mixed = load_mixture([{"path": sets["four"]}, {"path": sets["six"]}])
    assert prompts(mixed) == [*(f"four{i}" for i in range(4)), *(f"six{i}" for i in range(6))]
    assert mixed.column_names == ["prompt", "chosen", "rejected"]


@pytest.mark.parametrize(
    ("fractions", "counts"),
    [((1, 1), (6, 6)), ((0.5, 0.5), (6, 6)), ((0.25, 0.75), (2, 6)), ((0.75, 0.25), (10, 3)), ((0, 1), (0, 6))],
)
def test_fractions_are_shares_of_a_mixture_in_which_no_row_stands_twice(sets, fractions, counts):
    """0.75 of 10 rows and 0.25 of 6: 10 / 0.75 = 13.3 rows in all, of which the second gives 3."""
    parts = [{"path": sets[name], "fraction": f} for name, f in zip(("ten", "six"), fractions, strict=True)]
    expected = [*(f"ten{i}" for i in range(counts[0])), *(f"six{i}" for i in range(counts[1]))]
    assert prompts(load_mixture(parts)) == expected


def test_fractions_take_the_rows_that_trl_takes(sets):
    trl = pytest.importorskip("trl.scripts.utils")
    parts = [
        {"path": "json", "data_files": sets["ten"], "fraction": 0.7},
        {"path": "json", "data_files": sets["six"], "fraction": 0.2},
    ]
    theirs = trl.get_dataset(trl.DatasetMixtureConfig(datasets=[trl.DatasetConfig(**part) for part in parts]))
    assert prompts(load_mixture(parts)) == theirs["train"]["prompt"]


def test_weights_are_shares_of_a_sets_own_rows(sets):
    parts = [{"path": sets["ten"], "weight": 0.5, "seed": 3}, {"path": sets["four"], "weight": 1.0}]
    mixed = prompts(load_mixture(parts))
    drawn = Dataset.from_list(make_rows(10)).add_column("n", range(10)).shuffle(seed=3)["n"][:5]
    assert mixed == [*(f"ten{i}" for i in drawn), *(f"four{i}" for i in range(4))]
    assert prompts(load_mixture([{"path": sets["ten"], "weight": 0.35}])) != []


def test_columns_are_cut(tmp_path, sets):
    path = save(tmp_path / "more.jsonl", [{"prompt": "p", "chosen": "c", "rejected": "r", "extra": 1}])
    mixed = load_mixture([{"path": path, "columns": ["prompt", "chosen", "rejected"]}, {"path": sets["four"]}])
    assert mixed.column_names == ["prompt", "chosen", "rejected"]
    with pytest.raises(ValueError, match=r"columns must .* got 'promt'"):
        load_mixture([{"path": path, "columns": ["promt"]}])


def test_sets_of_other_columns_keep_their_own(tmp_path, sets):
    chat = {"chosen": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
    rows = [{**chat, "rejected": [*chat["chosen"][:1], {"role": "assistant", "content": "no"}]}]
    mixed = load_mixture([{"path": sets["four"]}, {"path": save(tmp_path / "chat.jsonl", rows)}])
    assert mixed.column_names == [ROW_JSON]
    assert raw_example(mixed[0]) == {"prompt": "four0", "chosen": "good", "rejected": "bad"}
    assert raw_example(mixed[4]) == rows[0]


def test_single_answers_are_gathered_before_they_meet_pairs(tmp_path, sets):
    scores = {"correctness": 1, "coherence": 1, "complexity": 1, "verbosity": 1}
    answers = [{"prompt": "p", "response": text, "helpfulness": rank, **scores} for rank, text in enumerate("abc")]
    mixed = load_mixture([{"path": sets["four"]}, {"path": save(tmp_path / "answers.jsonl", answers)}])
    assert len(mixed) == 5  # four pairs, and one prompt with three answers
    assert "responses" in raw_example(mixed[4])


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train[:2]", ["train0", "train1"]),
        ("train[75%:]", ["train6", "train7"]),
        ("test+train[:1]", ["test0", "test1", "train0"]),
        ("test", ["test0", "test1"]),
        ("test[:1000]", ["test0", "test1"]),
        ("train[-1:]", ["train7"]),
    ],
)
def test_splits_of_a_directory_may_be_cut_and_added(tmp_path, split, expected):
    for name, num_rows in (("train", 8), ("test", 2)):
        rows = [{"prompt": f"{name}{i}", "chosen": "good", "rejected": "bad"} for i in range(num_rows)]
        save(tmp_path / f"{name}.jsonl", rows)
    assert prompts(load_mixture([{"path": str(tmp_path), "split": split}])) == expected


def test_a_split_that_cannot_be_read_is_refused(sets):
    with pytest.raises(ValueError, match=r"split must .*got 'train\[a:b\]'"):
        load_mixture([{"path": sets["four"], "split": "train[a:b]"}])
    with pytest.raises(ValueError, match=r"split must .*got 'train\[:1\]'"):
        load_mixture([{"path": sets["four"], "split": "train[:1]"}], streaming=True)


def test_files_and_folders_are_read_by_builders_too(tmp_path, sets):
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "a.csv").write_text("prompt,chosen,rejected\nx,y,z\n")
    mixed = load_mixture(
        [
            {"path": "json", "data_files": [sets["four"], sets["six"]]},
            {"path": "csv", "data_dir": str(tmp_path / "csv")},
            {"path": "json", "data_files": {"train": sets["ten"], "test": sets["four"]}, "split": "test"},
        ]
    )
    assert len(mixed) == 4 + 6 + 1 + 4
    with pytest.raises(ValueError, match=r"dataset 'json' with .*nowhere.* cannot be read"):
        load_mixture([{"path": "json", "data_files": str(tmp_path / "nowhere.json")}])


def test_streams_stand_one_behind_the_other(tmp_path, sets):
    parts = [{"path": sets["four"]}, {"path": "json", "data_files": sets["six"], "columns": ["prompt", "chosen"]}]
    mixed = load_mixture(parts, streaming=True)
    assert prompts(mixed) == [*(f"four{i}" for i in range(4)), *(f"six{i}" for i in range(6))]
    assert raw_example(list(mixed)[-1]) == {"prompt": "six5", "chosen": "good"}
    alike = load_mixture([{"path": "json", "data_files": sets[name]} for name in ("four", "six")], streaming=True)
    assert prompts(alike) == prompts(mixed)
    assert prompts(load_mixture([{"path": sets["four"]}], streaming=True)) == [f"four{i}" for i in range(4)]


def test_a_share_of_a_stream_is_refused(sets):
    with pytest.raises(ValueError, match="weight must not be given"):
        load_mixture([{"path": sets["four"], "weight": 0.5}], streaming=True)
    assert len(list(load_mixture([{"path": sets["four"], "weight": 1.0}], streaming=True))) == 4


def test_a_mixture_of_nothing_is_refused(sets):
    with pytest.raises(ValueError, match=r"datasets must .*got \[0\]"):
        load_mixture([{"path": sets["four"], "weight": 0.1}])
