"""Comparisons are read from whatever columns, words and files arenas use; rows that say nothing are counted."""

import csv
import gzip
import json

import numpy as np
import pytest

from fastdpo.ranking.comparisons import Comparisons, comparisons_of, read_comparisons

ROWS = [
    {"model_a": "x", "model_b": "y", "winner": "model_a"},
    {"model_a": "y", "model_b": "x", "winner": "model_b"},
    {"model_a": "z", "model_b": "x", "winner": "tie"},
]


def outcomes(*winners, **more):
    return comparisons_of([{"model_a": "x", "model_b": "y", "winner": w, **more} for w in winners]).outcomes.tolist()


def test_models_are_numbered_as_they_come():
    read = comparisons_of(ROWS)
    assert read.models == ("x", "y", "z")
    assert read.first.tolist() == [0, 1, 2]
    assert read.second.tolist() == [1, 0, 0]
    assert read.outcomes.tolist() == [1, 0, 0.5]
    assert read.clusters is None
    assert read.lengths is None
    assert read.counts().tolist() == [[2, 1, 0], [0, 0, 2], [0, 1, 0]]  # wins, ties, losses
    assert read.points().tolist() == [[0, 2, 0.5], [0, 0, 0], [0.5, 0, 0]]


def test_words_of_arenas_and_names_of_models_are_winners():
    assert outcomes("model_a", "A", "[[A]]", "left", "assistant_a", "response_1", "x", " x ", 1, "1", 1.0) == [1] * 11
    assert outcomes("model_b", "b", "[[B]]", "Right", "assistant_b", "second", "y", 2, "2.0") == [0] * 9
    ties = ["tie", "Tie", "tie (bothbad)", "both_bad", "bothbad", "draw", "[[C]]", "no_preference", 1.5]
    assert outcomes(*ties) == [0.5] * 9
    assert outcomes("[[A>>B]]", "A > B", "[[B<A]]", "b<<a") == [1] * 4
    assert outcomes("[[B>A]]", "A<B", "[[A=B]]", "B=A") == [0, 0, 0.5, 0.5]


def test_a_model_may_be_named_like_a_side_or_a_tie():
    rows = [{"model_a": "b", "model_b": "tie", "winner": winner} for winner in ("b", "tie", "model_a")]
    assert comparisons_of(rows).outcomes.tolist() == [1, 0, 1]


def test_rows_without_a_result_are_counted_by_reason():
    bad = [
        {"model_a": "x", "model_b": "y", "winner": "gpt-1"},  # ends in 1, but is another model
        {"model_a": "x", "model_b": "y", "winner": "qwen_b"},
        {"model_a": "x", "model_b": "y", "winner": None},
        {"model_a": "x", "model_b": "y", "winner": float("nan")},
        {"model_a": "x", "model_b": "y", "winner": 7},
        {"model_a": "x", "model_b": "y", "winner": True},
        {"model_a": "x", "model_b": "x", "winner": "tie"},
        {"model_a": "", "model_b": "x", "winner": "tie"},
    ]
    read = comparisons_of([*ROWS, *bad])
    assert len(read.outcomes) == 3
    assert sum(read.left_out.values()) == 8
    assert read.left_out["no winner"] == 2
    assert read.left_out["a model compared with itself"] == 1
    assert (
        read.left_out["a winner that is neither of the two models nor a tie, such as 'gpt-1'"] == 4
    )  # one example says it


def test_zero_and_one_alone_are_refused_because_zero_may_be_the_second_model():
    assert outcomes(0, 1, 2) == [0.5, 1, 0]
    with pytest.raises(ValueError, match=r"winner must be .*, got only 0 and 1"):
        outcomes(0, 1, 1)


def test_three_columns_of_flags_are_read():
    flags = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0), (1, 1, 0)]
    names = ("winner_model_a", "winner_model_b", "winner_tie")
    rows = [{"model_a": "x", "model_b": "y", **dict(zip(names, values, strict=True))} for values in flags]
    read = comparisons_of(rows)
    assert read.outcomes.tolist() == [1, 0, 0.5]
    assert list(read.left_out.values()) == [2]


def test_other_names_of_columns_can_be_mapped():
    rows = [{"generator_1": "x", "generator_2": "y", "preference": 2.0}]
    columns = {"model_a": "generator_1", "model_b": "generator_2", "winner": "preference"}
    assert comparisons_of(rows, columns=columns).outcomes.tolist() == [0]
    with pytest.raises(ValueError, match=r"columns must map .*, got 'prompt'"):
        comparisons_of(rows, columns={"prompt": "x"})


def test_rows_of_one_prompt_are_one_cluster_and_rows_without_one_are_alone():
    prompts = ["p", "q", "p", None, None, ""]
    rows = [{**ROWS[0], "prompt": prompt, "question_id": None} for prompt in prompts]
    by_prompt = comparisons_of(rows, cluster="prompt").clusters
    assert len(set(by_prompt.tolist())) == 5
    assert by_prompt[0] == by_prompt[2]
    assert comparisons_of(rows).clusters is None  # question_id stands before prompt, and says nothing
    assert comparisons_of(rows, cluster="none").clusters is None
    with pytest.raises(ValueError, match=r"cluster must be one of the columns .*, got 'topic'"):
        comparisons_of(rows, cluster="topic")


def test_a_prompt_may_be_a_list_of_messages():
    rows = [{**ROWS[0], "prompt": [{"role": "user", "content": text}]} for text in ("hello", "hello", "bye")]
    assert comparisons_of(rows).clusters.tolist() == [0, 0, 1]


def test_lengths_are_read_from_numbers_from_arenas_metadata_and_from_texts():
    conversation = [{"role": "user", "content": "a long question"}, {"role": "assistant", "content": "four"}]
    for more in (
        {"length_a": 4, "length_b": "2"},
        {"tokens_a": 4, "tokens_b": 2},
        {"conv_metadata": {"sum_assistant_a_tokens": 4, "sum_assistant_b_tokens": 2}},
        {"response_a": "four", "response_b": "to"},
        {"conversation_a": conversation, "conversation_b": [{"role": "assistant", "content": "to"}]},
        {"response_a": ["fo", "ur"], "response_b": ["to"]},  # one text for each turn
    ):
        assert comparisons_of([{**ROWS[0], **more}]).lengths.tolist() == [[4, 2]], more


def test_lengths_that_some_rows_lack_are_not_known():
    assert comparisons_of([{**ROWS[0], "length_a": 4, "length_b": 2}, {**ROWS[1], "length_a": 4}]).lengths is None


def test_every_kind_of_file_gives_the_same_comparisons(tmp_path):
    from datasets import Dataset

    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    Dataset.from_list(ROWS).to_parquet(tmp_path / "a.parquet")
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t"), ("b.csv", ";")):
        with (tmp_path / name).open("w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, ROWS[0], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(ROWS)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").write_text(lines)
    for name in ("a.jsonl", "a.json", "a.jsonl.gz", "a.parquet", "a.csv", "a.tsv", "b.csv", "folder"):
        read = read_comparisons(tmp_path / name)
        assert (read.models, read.outcomes.tolist()) == (("x", "y", "z"), [1, 0, 0.5]), name


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "must not be empty"),
        ("a.json", "[]", "at least one row"),
        ("a.jsonl", "{", "malformed JSON"),
        ("a.csv", "", "at least one comparison, got none"),
        ("a.csv", "model_a,model_b,winner\n", "at least one comparison, got none"),
        ("a.csv", "model_a,model_b,winner\nx,y\n", "same number of cells"),
        ("a.csv", "model_a,model_b,winner\nx,y,model_a,z\n", "same number of cells"),
        ("a.csv", b"model_a,model_b,winner\n\xff,y,tie\n", "cannot be read"),
        ("a.jsonl", '{"model_a": "x", "model_b": "y"}', "without 'winner'"),
        ("a.jsonl", '{"prompt": "p", "chosen": "x", "rejected": "y"}', "without 'model_a'.*--models A B"),
        (
            "a.jsonl",
            '{"model_a": "x", "model_b": "x", "winner": "tie"}',
            "got 1 unusable rows: a model compared with itself: 1",
        ),
        ("a.txt", "x", "must all be JSON or all Parquet"),
    ],
)
def test_files_that_hold_no_comparisons_are_refused(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read_comparisons(path)


def test_a_file_that_is_not_there_is_named(tmp_path):
    for name in ("a.csv", "a.jsonl"):
        with pytest.raises(ValueError, match=f"does not exist: .*{name}"):
            read_comparisons(tmp_path / name)


def test_models_can_be_left_out():
    read = comparisons_of([{**row, "length_a": 3, "length_b": 5, "prompt": "p"} for row in ROWS])
    left = read.without(["y"])
    assert left.models == ("x", "z")
    assert (left.first.tolist(), left.second.tolist(), left.outcomes.tolist()) == ([1], [0], [0.5])
    assert left.lengths.tolist() == [[3, 5]]
    with pytest.raises(ValueError, match=r"exclude must name models .*got 'w'"):
        read.without(["w"])


def test_numbers_that_cannot_be_comparisons_are_refused():
    first, second = np.array([0]), np.array([1])
    with pytest.raises(ValueError, match="first must hold 1 numbers from 0 to 1"):
        Comparisons(("x", "y"), np.array([2]), second, np.array([1.0]))
    with pytest.raises(ValueError, match="outcomes must be 1, 0"):
        Comparisons(("x", "y"), first, second, np.array([2.0]))
