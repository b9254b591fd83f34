"""clean_data: what is removed, what is left, and that nothing is half-written."""

import gzip
import json

import pytest
from peers import peer
from tiny import make_byte_tokenizer

from fastdpo.data.tokens.settings import TokenizationSettings
from fastdpo.inspection import clean_data, inspect_data
from fastdpo.inspection.clean import FAULTS


def pair(chosen="yes", rejected="no", prompt="Q", **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def lines(path):
    opened = gzip.open if path.name.endswith(".gz") else open
    with opened(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


ROWS = [
    pair("a", "b", id=0),
    pair("same", "same", id=1),
    pair("a", "b", id=2),  # repeats row 0
    pair("x", "y", "P", id=3),
    pair("y", "x", "P", id=4),  # contradicts row 3
    pair("a", "b", "R", id=5),
    pair("b", "c", "R", id=6),
    pair("c", "a", "R", id=7),  # closes a cycle
    pair("é", "\u2028否", "held out", id=8),
    pair("Yes", "yes ", "S", id=9),
]


def test_each_removed_row_has_a_line_with_its_fault_and_the_rows_it_goes_with(tmp_path):
    done = clean_data(ROWS, tmp_path / "new" / "clean.jsonl")
    assert (done.num_rows, done.num_kept) == (10, 3)
    assert done.removed == {"unusable": 1, "duplicates": 1, "contradictions": 2, "cycles": 3}
    assert lines(done.out) == [ROWS[0], ROWS[8], ROWS[9]]  # as they stand, other columns too
    log = lines(done.log)
    assert done.log == tmp_path / "new" / "clean.removed.jsonl"
    assert [(line["row"], line["fault"], line["detail"]) for line in log] == [
        (1, "unusable", "chosen equals rejected"),
        (2, "duplicates", "repeats row 0"),
        (3, "contradictions", "contradicted by row 4"),
        (4, "contradictions", "contradicted by row 3"),
        (5, "cycles", "on the cycle of rows 5, 6, 7"),
        (6, "cycles", "on the cycle of rows 5, 6, 7"),
        (7, "cycles", "on the cycle of rows 5, 6, 7"),
    ]
    assert log[0]["removed"] == ROWS[1]
    assert sorted(path.name for path in done.out.parent.iterdir()) == ["clean.jsonl", "clean.removed.jsonl"]


def test_what_is_left_has_none_of_the_faults(tmp_path):
    held_out = [pair(prompt="held out")]
    done = clean_data(ROWS, tmp_path / "clean.jsonl.gz", eval_data=held_out)
    assert done.removed["eval_prompts"] == 1
    assert [row["id"] for row in lines(done.out)] == [0, 9]
    assert done.log.name == "clean.removed.jsonl"
    found = inspect_data(done.out, eval_data=held_out)
    names = ("rows", "duplicates", "contradictions", "cycles", "train and eval")
    assert [found.check(name).verdict for name in names] == ["ok"] * 5


def test_only_the_faults_that_are_named_remove_rows(tmp_path):
    done = clean_data(ROWS, tmp_path / "clean.jsonl", remove=["equal_answers"], log=tmp_path / "log.jsonl")
    assert [line["row"] for line in lines(tmp_path / "log.jsonl")] == [9]
    assert done.num_kept == 9


def test_the_side_that_more_rows_hold_stays_though_it_is_a_repetition(tmp_path):
    rows = [pair("x", "y", id=0), pair("y", "x", id=1), pair("x", "y", id=2)]
    done = clean_data(rows, tmp_path / "clean.jsonl")
    assert [row["id"] for row in lines(done.out)] == [0]
    assert done.removed == {"duplicates": 1, "contradictions": 1}


def test_of_rows_that_are_alike_the_first_that_is_left_stays(tmp_path):
    peer("datasketch")
    text = " ".join(f"word{i}" for i in range(200))
    rows = [pair(text, "no"), pair(text + " and", "no"), pair(text + " or", "no"), pair("no", text)]
    done = clean_data(rows, tmp_path / "clean.jsonl", remove=["contradictions", "near_duplicates"])
    assert [(line["row"], line["detail"]) for line in lines(done.log)] == [
        (0, "contradicted by row 3"),
        (2, "like row 1"),
        (3, "contradicted by row 0"),
    ]


def test_faults_that_the_tokenizer_finds(tmp_path):
    rows = [pair("b" * 30, "b", id=0), pair("x</s>y", "b", id=1), pair("b" * 30, "c" * 30, id=2), pair(id=3)]
    faults = ["one_side_cut", "ends_cut", "special_tokens", "lost_content"]
    settings = TokenizationSettings(max_length=20)
    done = clean_data(
        rows, tmp_path / "clean.jsonl", remove=faults, tokenizer=make_byte_tokenizer(None), settings=settings
    )
    assert done.removed == {"one_side_cut": 1, "special_tokens": 1, "ends_cut": 1}
    assert [(line["row"], line["fault"]) for line in lines(done.log)] == [
        (0, "one_side_cut"),
        (1, "special_tokens"),
        (2, "ends_cut"),
    ]


def test_trees_are_written_as_the_ranked_rows_that_they_become(tmp_path):
    reply = [{"text": t, "role": "assistant", "rank": r, "replies": []} for t, r in (("5", 1), ("4", 0))]
    tree = {"message_tree_id": "t", "tree_state": "x", "prompt": {"text": "2+2?", "role": "prompter", "replies": reply}}
    done = clean_data([tree, tree], tmp_path / "clean.jsonl")
    (row,) = lines(done.out)
    assert (row["responses"], row["scores"]) == (["5", "4"], [-1, 0])
    assert done.removed == {"duplicates": 1}


@pytest.mark.parametrize(
    ("out", "more", "message"),
    [
        ("clean.csv", {}, r"out must end in one of .jsonl, .ndjson, .jsonl.gz, .ndjson.gz, got"),
        ("rows.jsonl", {}, "out must not be the input file"),
        ("clean.jsonl", {"log": "clean.jsonl"}, "log must differ from out"),
        ("clean.jsonl", {"log": "rows.jsonl"}, "log must not be the input file"),
        ("clean.jsonl", {"remove": ["dupes"]}, "remove must be names of unusable, .*got dupes"),
        ("clean.jsonl", {"remove": []}, "remove must be names of .*got none"),
        (
            "clean.jsonl",
            {"remove": ["eval_prompts"]},
            "remove must not hold eval_prompts without evaluation data; give it with --eval FILE",
        ),
        (
            "clean.jsonl",
            {"remove": ["ends_cut"]},
            "remove must not hold ends_cut without a tokenizer; name its model with --model",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_a_file_is_written(tmp_path, monkeypatch, out, more, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(json.dumps(pair()) + "\n")
    with pytest.raises(ValueError, match=message):
        clean_data("rows.jsonl", out, **more)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    assert lines(tmp_path / "rows.jsonl") == [pair()]


def test_near_duplicates_without_datasketch_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("fastdpo.inspection.clean.is_available", lambda: False)
    with pytest.raises(ValueError, match="near_duplicates without datasketch"):
        clean_data(ROWS, tmp_path / "clean.jsonl", remove=["near_duplicates"])


def test_data_of_which_nothing_is_left_and_a_broken_line_leave_no_file(tmp_path):
    with pytest.raises(ValueError, match="must hold at least one row without a fault, got 2 rows with faults in list"):
        clean_data([pair("a", "b"), pair("b", "a")], tmp_path / "clean.jsonl")
    (tmp_path / "rows.jsonl").write_text(json.dumps(pair()) + "\n{broken\n")
    with pytest.raises(ValueError, match=r"malformed JSON in .*, line 2"):
        clean_data(tmp_path / "rows.jsonl", tmp_path / "clean.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_an_interrupt_while_writing_leaves_what_was_there(tmp_path):
    (tmp_path / "clean.jsonl").write_text("earlier\n")

    def interrupted(rows, what):
        for number, row in enumerate(rows):
            if what == "writing" and number == 2:
                raise KeyboardInterrupt
            yield row

    with pytest.raises(KeyboardInterrupt):
        clean_data(ROWS, tmp_path / "clean.jsonl", progress=interrupted)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"clean.jsonl": "earlier\n"}


def test_every_fault_says_which_rows_it_removes():
    assert all(fault.what.startswith("rows ") for fault in FAULTS.values())
