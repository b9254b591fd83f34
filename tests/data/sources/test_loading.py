import gzip
import json

import pytest
from datasets import Dataset, DatasetDict

from fastdpo.data.forms.formats import preference_row
from fastdpo.data.sources.loading import (
    iterate_examples,
    load_preference_dataset,
    raw_example,
    stream_preference_dataset,
)

ROWS = [{"prompt": f"Q{i}?", "chosen": f" é{i}", "rejected": "\u2028否"} for i in range(3)]  # U+2028 ends no line
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("array.json", json.dumps(ROWS, indent=1)),
        ("lines.json", LINES),
        ("lines.jsonl", LINES.replace("\n", "\r\n\r\n")),  # blank lines and Windows line ends are no rows
        ("bom.jsonl", "\ufeff" + LINES),
    ],
)
def test_json_files_load_as_arrays_and_as_lines_gzipped_or_not(tmp_path, name, text, compressed):
    path = tmp_path / (name + ".gz" * compressed)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if compressed else data)
    assert list(load_preference_dataset(path)) == ROWS
    assert list(iterate_examples(path)) == ROWS


def test_examples_come_one_at_a_time_and_as_they_stand_in_the_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "Q", "chosen": 1}, {"prompt": "Q", "chosen": 2.5, "more": None}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken")
    examples = iterate_examples(path)
    assert [next(examples), next(examples)] == rows  # before the broken line is reached
    with pytest.raises(ValueError, match=r"malformed JSON in .*rows\.jsonl, line 3"):
        next(examples)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="must hold at least one row"):
        next(iterate_examples(tmp_path / "empty.jsonl"))
    Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    assert list(iterate_examples(tmp_path / "rows.parquet")) == ROWS


def test_parquet_and_saved_datasets_load(tmp_path):
    dataset = Dataset.from_list(ROWS)
    dataset.to_parquet(tmp_path / "rows.parquet")
    dataset.save_to_disk(str(tmp_path / "one"))
    DatasetDict({"train": dataset, "test": dataset.select([2])}).save_to_disk(str(tmp_path / "two"))
    assert list(load_preference_dataset(str(tmp_path / "rows.parquet"))) == ROWS
    assert list(load_preference_dataset(tmp_path / "one")) == ROWS
    assert list(load_preference_dataset(tmp_path / "two", split="test")) == ROWS[2:]
    with pytest.raises(ValueError, match=r"split must be one of \['test', 'train'\].*'eval'"):
        load_preference_dataset(tmp_path / "two", split="eval")


def test_a_directory_gives_the_files_of_the_split(tmp_path):
    (tmp_path / "a.jsonl").write_text(LINES)
    (tmp_path / "test.jsonl").write_text(json.dumps(ROWS[0]))
    assert list(load_preference_dataset(tmp_path)) == ROWS
    assert list(load_preference_dataset(tmp_path, split="test")) == ROWS[:1]
    with pytest.raises(ValueError, match=r"split 'eval'.*found: a.jsonl, test.jsonl"):
        load_preference_dataset(tmp_path, split="eval")


@pytest.mark.parametrize(
    ("names", "split", "expected"),
    [
        (
            ["train_sft-00000-of-00001.jsonl", "train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"],
            "train",
            [1, 2],
        ),
        (["train_prefs-0.jsonl", "train_sft-0.jsonl"], "train_prefs", [0]),
        (["constraints/test.jsonl", "helpful/train.jsonl.gz", "train/a.jsonl"], "train", [1, 2]),
        (["my_train_1.jsonl", "my_test_1.jsonl"], "train", [0]),
        (["latest.jsonl", "developers.jsonl", "validation.jsonl"], "train", [0, 1]),
    ],
)
def test_a_split_is_a_word_in_the_names_of_files(tmp_path, names, split, expected):
    for number, name in enumerate(names):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        data = json.dumps({"number": number}).encode()
        file.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert sorted(load_preference_dataset(tmp_path, split)["number"]) == expected


def test_rows_that_no_common_columns_hold_come_back_as_they_were(tmp_path):
    rows = [
        {"prompt": "Q", "chosen": "a", "rejected": "b"},
        {"prompt": [{"role": "user", "content": "Q"}], "chosen": {"role": "assistant", "content": "a"}, "rejected": 5},
        {"chosen": "xa", "rejected": "xb \ud83d"},
    ]
    path = tmp_path / "mixed.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    dataset = load_preference_dataset(path)
    assert [raw_example(example) for example in dataset] == rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"a": 1}\n\n{"a": 2,}\n', "malformed JSON in .*a.jsonl, line 3, column"),
        ("a.json", '[{"a": 1},\n {"a": }]', "malformed JSON in .*a.json, line 2, column"),
        ("a.json", '{\n "a": 1\n}', "must hold a list of objects or one object per line"),
        ("a.json", "[1, 2]", "must hold a list of objects, got 1 as element 0"),
        ("a.jsonl", '{"a": 1}\n"text"\n', 'must hold one object per line, got "text" in line 2'),
        ("a.jsonl", "\n \n", "must not be empty"),
        ("a.json", "[]", "at least one row"),
        ("a.json", b'{"a": 1}\n{"a": "\xff"}', "must be UTF-8: .*, line 2"),
        ("a.jsonl.gz", b"not gzip", "not a whole gzip file"),
        # with mtime 0: the bytes are part of the test's name, which must not change from second to second
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-12], "not a whole gzip file"),
        ("a.parquet", b"not parquet", "not readable as Parquet"),
        ("a.csv", "a,b", r"must .*\(\.json.* got .*a\.csv"),
    ],
)
def test_faulty_files_are_refused_with_the_place_of_the_fault(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        load_preference_dataset(path)


@pytest.mark.parametrize("path", ["no/such/file.jsonl", "./nothing", "/nowhere/at/all"])
def test_a_missing_file_is_named(path):
    with pytest.raises(ValueError, match=f"dataset file does not exist: {path}"):
        load_preference_dataset(path)


@pytest.mark.parametrize(
    ("name", "num_rows"),
    [
        ("llms-from-scratch-preference.json", 1100),
        ("llama-factory-dpo-en-demo.json", 300),
        ("llama-factory-dpo-zh-demo.json", 300),
        ("llama-factory-v1-dpo-demo.jsonl", 10),
        ("hh-rlhf-harmless-test-benign44.jsonl", 44),
        ("torchtune-hh-rlhf-tiny.json", 1),
    ],
)
def test_real_files_load_and_every_row_has_a_prompt_and_two_responses(shared_data, name, num_rows):
    rows = [preference_row(raw_example(example)) for example in load_preference_dataset(shared_data / name)]
    assert len(rows) == num_rows
    for row in rows:
        assert row.prompt
        assert all(row.responses)
        if row.is_conversational:
            assert row.prompt[-1]["role"] in ("user", "tool")
            assert [message["role"] for response in row.responses for message in response] == ["assistant"] * 2


def test_streams_give_the_rows_of_the_files_in_order(tmp_path):
    (tmp_path / "array.json").write_text(json.dumps(ROWS, indent=1))
    (tmp_path / "lines.jsonl").write_text(LINES.replace("\n", "\r\n\r\n"), newline="")
    (tmp_path / "zipped.jsonl.gz").write_bytes(gzip.compress(LINES.encode()))
    Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    for name in ("array.json", "lines.jsonl", "zipped.jsonl.gz", "rows.parquet", "saved"):
        stream = stream_preference_dataset(tmp_path / name)
        for _ in range(2):  # and again, as another epoch would
            assert [raw_example(example) for example in stream] == ROWS, name
    folder = tmp_path / "folder"
    folder.mkdir()
    for i in (0, 1):
        (folder / f"{i}.jsonl").write_text(json.dumps(ROWS[i]))
    assert [raw_example(example) for example in stream_preference_dataset(folder)] == ROWS[:2]


def test_a_fault_in_a_streamed_file_is_told_when_it_is_reached(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n{"a": 2,}\n')
    rows = iter(stream_preference_dataset(tmp_path / "a.jsonl"))
    assert raw_example(next(rows)) == {"a": 1}
    with pytest.raises(ValueError, match=r"malformed JSON in .*a.jsonl, line 3, column"):
        next(rows)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(LINES.encode())[:-12])
    with pytest.raises(ValueError, match=r"cannot be read: .*b.jsonl.gz"):
        list(stream_preference_dataset(tmp_path / "b.jsonl.gz"))
    with pytest.raises(ValueError, match="dataset file does not exist"):
        stream_preference_dataset("./nothing.jsonl")


def test_a_published_dataset_is_loaded_with_its_configuration_and_split(monkeypatch):
    """load_dataset is replaced: no test reaches the Hub."""

    def load_dataset(path, name=None, *, split, streaming):
        if name is None:
            raise ValueError("Config name is missing. Please pick one among the available configs: ['en', 'zh']")
        return path, name, split, "streamed" if streaming else "loaded"

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert load_preference_dataset("someone/pairs", "test", "en") == ("someone/pairs", "en", "test", "loaded")
    assert stream_preference_dataset("someone/pairs", config_name="zh") == ("someone/pairs", "zh", "train", "streamed")
    with pytest.raises(ValueError, match=r"'someone/pairs' with dataset_config None .* Config name is missing"):
        load_preference_dataset("someone/pairs")


def test_a_file_has_no_configuration(tmp_path):
    (tmp_path / "a.jsonl").write_text(LINES)
    for load in (load_preference_dataset, stream_preference_dataset):
        with pytest.raises(ValueError, match=r"dataset_config must .*got 'en'"):
            load(tmp_path / "a.jsonl", config_name="en")
