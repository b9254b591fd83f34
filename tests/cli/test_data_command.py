"""`fastdpo data` end to end: tables, JSON, page, exit codes, files, and mistakes in one line."""

import json
import re

import pytest
from cli_runs import run
from kills import killed
from tiny import make_byte_tokenizer, make_rows


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Rows without a fault but a repetition, held-out rows, and a tokenizer."""
    rows = make_rows(40)
    write(tmp_path / "pairs.jsonl", [*rows, rows[7]])
    write(tmp_path / "held_out.jsonl", [rows[3], *make_rows(30, seed=9)])
    make_byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_inspect_prints_a_verdict_for_each_check_and_what_to_do(capsys, place):
    code, out, err = run(capsys, "data", "inspect", "pairs.jsonl", "--no_near")
    assert (code, err) == (0, "")
    rows = {line.split("  ")[0].strip(): line for line in out.splitlines()}
    assert "look" in rows["duplicates"]
    assert "1 of 41 (2.4%) rows repeat an earlier row" in rows["duplicates"]
    assert "7, 40" in rows["duplicates"]
    assert "41 of 41 kept" in rows["rows"]
    assert "skipped" in rows["train and eval"]
    assert "near duplicates" not in out
    assert "duplicates: `fastdpo data clean` keeps the first of each." in out
    assert "first row, as it is read" in out


@pytest.mark.parametrize(
    ("more", "code"),
    [
        ((), 0),
        (("--fail_on", "look"), 1),
        (("--fail-on=look",), 1),
        (("--eval", "held_out.jsonl"), 1),  # 1 of 31 prompts is bad
    ],
)
def test_the_exit_code_says_whether_a_check_fails(capsys, place, more, code):
    assert run(capsys, "data", "inspect", "pairs.jsonl", "--no-near", *more)[0] == code


def test_json_holds_every_check_and_the_tokens(capsys, place):
    options = ("--model", "tokenizer", "--max_length", "60", "--eval", "held_out.jsonl", "--no_near")
    code, out, err = run(capsys, "data", "inspect", "pairs.jsonl", "--json", "--html", "page.html", *options)
    assert (code, err) == (1, "")
    found = json.loads(out)
    assert (found["data"], found["verdict"], found["page"]) == ("pairs.jsonl", "bad", "page.html")
    checks = {check["name"]: check for check in found["checks"]}
    assert checks["duplicates"]["examples"] == [[7, 40]]
    assert checks["train and eval"]["eval_rows"] == [0]
    assert checks["ends cut"]["numbers"]["num_found"] > 0
    assert checks["savings"]["numbers"]["unit"] == "tokens"
    assert set(found["tokens"]) == {"prompt", "chosen", "rejected"}
    assert "row 40" in (place / "page.html").read_text()


def test_a_model_shows_what_its_tokenizer_does(capsys, place):
    code, out, _ = run(capsys, "data", "inspect", "pairs.jsonl", "--model", "tokenizer", "--max_length", "none")
    assert code == 0
    assert "one side cut" in out
    assert "packing and sharing compute" in out
    assert out.count("median") == 1


def test_clean_writes_what_is_left_and_a_log(capsys, place):
    code, out, err = run(capsys, "data", "clean", "pairs.jsonl", "-o", "clean.jsonl", "--eval", "held_out.jsonl")
    assert (code, err) == (0, "")
    assert "kept 39 of 41 rows: clean.jsonl" in out
    assert [(line["row"], line["fault"]) for line in lines(place / "clean.removed.jsonl")] == [
        (3, "eval_prompts"),
        (40, "duplicates"),
    ]
    given = lines(place / "pairs.jsonl")
    assert lines(place / "clean.jsonl") == [row for number, row in enumerate(given) if number not in (3, 40)]
    assert run(capsys, "data", "inspect", "clean.jsonl", "--fail_on", "look", "--eval", "held_out.jsonl")[0] == 0


def test_clean_removes_the_faults_that_are_named(capsys, place):
    code, _, _ = run(capsys, "data", "clean", "pairs.jsonl", "-o", "c.jsonl", "--remove", "unusable,equal_answers")
    assert code == 0
    assert len(lines(place / "c.jsonl")) == 41


def test_convert_writes_pairs_that_train_reads(capsys, place):
    write(place / "ranked.jsonl", [{"prompt": "Q", "responses": ["a", "b", "c"], "scores": [3, 2, 1]}])
    code, out, _ = run(capsys, "data", "convert", "ranked.jsonl", "-o", "pairs_of_it.jsonl")
    assert code == 0
    assert "wrote 3 pairs: pairs_of_it.jsonl" in out
    assert lines(place / "pairs_of_it.jsonl")[0] == {
        "prompt": [{"role": "user", "content": "Q"}],
        "chosen": [{"role": "assistant", "content": "a"}],
        "rejected": [{"role": "assistant", "content": "b"}],
    }


def test_own_columns_are_named_as_for_training(capsys, place):
    write(place / "own.jsonl", [{"ask": f"Q {i}", "good": "a", "poor": "b", "draft": "c"} for i in range(3)])
    assert run(capsys, "data", "inspect", "own.jsonl")[0] == 2
    columns = ("--columns", "prompt=ask,chosen=good,rejected=poor,ignore=draft")
    assert run(capsys, "data", "inspect", "own.jsonl", *columns, "--no_near")[0] == 0
    assert run(capsys, "data", "convert", "own.jsonl", "-o", "out.jsonl", *columns)[0] == 0
    assert lines(place / "out.jsonl")[0]["prompt"] == [{"role": "user", "content": "Q 0"}]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("look",), "subcommand of data must be one of inspect, clean, convert, got 'look'"),
        (("inspect",), "the following arguments are required: FILE (all options: fastdpo data inspect --help)"),
        (("inspect", "missing.jsonl"), "dataset file does not exist: missing.jsonl (--data)"),
        (("inspect", "pairs.jsonl", "--eval", "gone.jsonl"), "dataset file does not exist: gone.jsonl (--eval)"),
        (("inspect", "empty.jsonl"), "must hold at least one row"),
        (("inspect", "broken.jsonl"), "malformed JSON in broken.jsonl, line 2"),
        (("inspect", "sft.jsonl"), "dataset must have the columns of a known format"),
        (("inspect", "pairs.jsonl", "--model", "./nothing"), "got ./nothing, which does not exist"),
        (("inspect", "pairs.jsonl", "--max_length", "1"), "max_length must be an integer >= 2 or None, got 1"),
        (("inspect", "pairs.jsonl", "--max_length", "long"), "argument --max_length: invalid int value: 'long'"),
        (("inspect", "pairs.jsonl", "--dataset_format", "explict"), "did you mean 'explicit'?"),
        (("inspect", "pairs.jsonl", "--model", "tokenizer", "--chat_template", "chatlm"), "chat_template must be"),
        (("inspect", "pairs.jsonl", "--fail_on", "ok"), "argument --fail_on: invalid choice: 'ok'"),
        (("inspect", "pairs.jsonl", "--num_examples", "0"), "num_examples must be at least 1, got 0"),
        (("clean", "pairs.jsonl"), "the following arguments are required: -o/--out"),
        (("clean", "pairs.jsonl", "-o", "pairs.jsonl"), "out must not be the input file"),
        (("clean", "pairs.jsonl", "-o", "x.jsonl", "--remove", "dupes"), "remove must be names of unusable"),
        (("convert", "pairs.jsonl", "-o", "pairs.json"), "out must end in one of .jsonl"),
        (("convert", "pairs.jsonl", "-o", "x.jsonl", "--model", "m"), "unrecognized arguments: --model m"),
    ],
)
def test_mistakes_are_told_in_one_line(capsys, place, words, message):
    (place / "empty.jsonl").write_text("\n")
    (place / "broken.jsonl").write_text('{"prompt": "Q", "chosen": "a", "rejected": "b"}\n{"prompt": \n')
    (place / "sft.jsonl").write_text('{"prompt": "Q", "completion": "a"}\n')
    before = sorted(path.name for path in place.iterdir())
    code, out, err = run(capsys, "data", *words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert sorted(path.name for path in place.iterdir()) == before


def test_help_lists_the_subcommands_and_shows_only_what_each_reads(capsys):
    code, out, _ = run(capsys, "data")
    assert code == 0
    assert all(f"\n  {name} " in out for name in ("inspect", "clean", "convert"))
    shown = {}
    for name in ("inspect", "clean", "convert"):
        with pytest.raises(SystemExit):
            run(capsys, "data", name, "--help")
        shown[name] = capsys.readouterr().out
    assert "--fail_on" in shown["inspect"]
    assert "--fail_on" not in shown["clean"]
    assert "--remove" in shown["clean"]
    assert "--model" not in shown["convert"]


def test_the_help_names_every_fault(capsys):
    from fastdpo.inspection.clean import FAULTS

    with pytest.raises(SystemExit):
        run(capsys, "data", "clean", "--help")
    words = re.findall(r"[a-z_]+", capsys.readouterr().out)
    assert set(FAULTS) <= set(words)


@pytest.mark.parametrize("when", [{}, {"after": True}], ids=["all written", "one in place"])
def test_a_killed_clean_leaves_no_half_of_a_file_and_runs_again(capsys, place, when):
    write(place / "many.jsonl", make_rows(30) * 20)
    words = ("data", "clean", "many.jsonl", "-o", "clean.jsonl")
    killed(words, "pathlib:Path.replace", **when)
    assert list(place.glob(".*partial"))
    for path in (place / "clean.jsonl", place / "clean.removed.jsonl"):
        assert not path.exists() or len(lines(path)) in (30, 570)
    code, out, err = run(capsys, *words)
    assert code == 0, err
    assert "kept 30 of 600 rows" in out
    assert len(lines(place / "clean.jsonl")) == 30
    assert len(lines(place / "clean.removed.jsonl")) == 570
    assert not list(place.glob(".*partial"))
