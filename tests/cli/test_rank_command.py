"""`fastdpo rank` end to end: models on pairs, files of comparisons, a kill in the middle, and everything it refuses."""

import json
import re
import subprocess
import sys

import pytest
from cli_runs import run, save_rows
from kills import killed, written_from_now_on
from tiny import make_llama, make_tokenizer

from fastdpo.references import precompute

ENGINE = ("--use_cpu", "true", "--disable_tqdm", "true")


@pytest.fixture
def pairs(tmp_path):
    """Two models, a reference, and 16 pairs."""
    for seed, name in enumerate(("one", "two", "ref")):
        make_llama(vocab_size=64, seed=seed).save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    save_rows(tmp_path / "pairs.jsonl")
    return tmp_path


def battles(path, text, **more):
    """A>B: model A won; A=B: a tie."""
    words = {">": "model_a", "<": "model_b", "=": "tie"}
    rows = [{"model_a": w[0], "model_b": w[2], "winner": words[w[1]], **more} for w in text.split()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def rank_pairs(capsys, folder, *more):
    models = ("--models", folder / "one", folder / "two")
    common = ("--data", folder / "pairs.jsonl", "--ref_cache_dir", folder / "cache", *ENGINE)
    return run(capsys, "rank", *models, *common, *more)


def test_ties_only_are_named_because_their_intervals_have_no_width(capsys, tmp_path):
    for text, is_said in (("A=B A=B B=A", True), ("A=B A=B A>B B>A", False)):
        code, out, err = run(
            capsys, "rank", "--data", battles(tmp_path / "b.jsonl", text), "--html", tmp_path / "p.html"
        )
        assert code == 0, err
        said = "no comparison tells the models apart"
        assert (said in out) == (said in (tmp_path / "p.html").read_text()) == is_said


def test_models_are_ranked_on_pairs_with_table_lines_and_page(capsys, pairs):
    out_file, page = pairs / "ratings.jsonl", pairs / "page.html"
    code, out, err = rank_pairs(capsys, pairs, "--reference", pairs / "ref", "-o", out_file, "--html", page)
    assert code == 0, err
    for fact in (
        "model 1 of 2",
        "accuracy, vs reference",
        "Bradley-Terry ratings",
        "16, of 16 prompts",
        "kept 16 of 16",
    ):
        assert fact in out, fact
    records = lines(out_file)
    assert {record["model"] for record in records} == {str(pairs / "one"), str(pairs / "two")}
    for record in records:
        assert record["rating_lower"] < record["rating"] < record["rating_upper"]
        assert record["accuracy_reference_lower"] <= record["accuracy_reference"] <= record["accuracy_reference_upper"]
        assert record["wins"] + record["ties"] + record["losses"] == record["num_pairs"] == 16
    assert sum(record["rating"] for record in records) == pytest.approx(2000)
    text = page.read_text()
    for part in (
        "Ratings",
        "Accuracy on the pairs",
        "Who beats whom",
        "data:image/svg+xml",
        "relative to the reference",
    ):
        assert part in text, part
    assert not (pairs / "not_used").exists()


def test_a_second_run_computes_nothing_and_says_the_same(capsys, pairs):
    assert rank_pairs(capsys, pairs, "-o", pairs / "first.jsonl")[0] == 0
    shards = {path: path.stat().st_mtime_ns for path in (pairs / "cache").rglob("*.safetensors")}
    assert len(shards) == 2  # one for each model
    assert rank_pairs(capsys, pairs, "-o", pairs / "second.jsonl")[0] == 0
    assert {path: path.stat().st_mtime_ns for path in (pairs / "cache").rglob("*.safetensors")} == shards
    assert lines(pairs / "first.jsonl") == lines(pairs / "second.jsonl")


def test_a_killed_run_goes_on_with_what_was_computed(capsys, pairs, monkeypatch):
    monkeypatch.setattr(precompute, "_SECONDS_PER_SHARD", 0.0)  # a shard after every batch
    models = ("rank", "--models", pairs / "one", pairs / "two", "--data", pairs / "pairs.jsonl", *ENGINE)
    models += ("--ref_tokens_per_batch", "20")  # a pair at a time
    words = (*models, "--ref_cache_dir", pairs / "cache")
    killed((*words, "-o", pairs / "killed.jsonl"), "fastdpo.references.cache:LogpsCache.write", 3, after=True)
    shards = {path: path.stat().st_mtime_ns for path in (pairs / "cache").rglob("*.safetensors")}
    assert len(shards) == 3
    assert not (pairs / "killed.jsonl").exists()
    written = written_from_now_on(monkeypatch)
    assert run(capsys, *words, "-o", pairs / "resumed.jsonl")[0] == 0
    num_resumed = len(written)
    assert run(capsys, *models, "--ref_cache_dir", pairs / "fresh", "-o", pairs / "whole.jsonl")[0] == 0
    assert 0 < num_resumed < len(written) - num_resumed  # what the killed run had computed is missing
    assert lines(pairs / "resumed.jsonl") == lines(pairs / "whole.jsonl")


def test_the_checkpoints_of_one_run_are_ranked(capsys, pairs):
    for seed, name in ((5, "run/checkpoint-2"), (6, "run/checkpoint-10")):
        make_llama(vocab_size=64, seed=seed).save_pretrained(pairs / name)
        make_tokenizer().save_pretrained(pairs / name)
    common = ("--data", pairs / "pairs.jsonl", "--ref_cache_dir", pairs / "cache", *ENGINE)
    code, out, err = run(capsys, "rank", "--models", pairs / "run", *common)
    assert code == 0, err
    assert out.index("model 1 of 2") < out.index("checkpoint-2") < out.index("checkpoint-10")
    code, _, err = run(capsys, "rank", "--models", pairs / "one", *common)
    assert code == 2
    assert "models must be two or more, or the folder of a run with several checkpoints, got one model" in err


def test_a_file_of_comparisons_is_ranked_without_a_model(capsys, tmp_path):
    file = battles(tmp_path / "battles.jsonl", "A>B A>B B>A B>C B>C C>B A=C x=x")
    out_file, page = tmp_path / "out.jsonl", tmp_path / "page.html"
    code, out, err = run(capsys, "rank", "--data", file, "-o", out_file, "--html", page)
    assert code == 0, err
    assert "a model compared with itself: 1" in out
    assert "only 7 comparisons: intervals are too narrow for fewer than 30" in out
    wins = out[out.index("who beats whom") :].splitlines()
    [of_a] = [line.split() for line in wins if line.split()[:1] == ["A"]]
    assert of_a == ["A", "67", "%", "50", "%"]  # A beats B in two of three, and ties with C
    assert [record["model"] for record in lines(out_file)] == ["A", "B", "C"]
    assert {"model", "rating", "rating_lower", "rating_upper"} <= lines(out_file)[0].keys()
    assert "data:image/svg+xml" in page.read_text()


def test_ties_only_and_names_with_brackets_are_ranked(capsys, tmp_path):
    file = tmp_path / "battles.jsonl"
    rows = [{"model_a": "[bold]x[/bold]", "model_b": "<b>y</b>", "winner": "tie", "prompt": "p"}] * 3
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = run(capsys, "rank", "--data", file, "--html", tmp_path / "page.html")
    assert code == 0, err
    assert "[bold]x[/bold]" in out
    assert "1 to 2" in out
    assert "1 prompt\n" in re.sub(" +", " ", out).replace(" \n", "\n")
    assert "<b>y</b>" not in (tmp_path / "page.html").read_text()


def test_length_anchor_exclude_and_confidence_are_read(capsys, tmp_path):
    rows = []
    for number in range(60):
        first, second = ("A", "B") if number % 2 else ("B", "C")
        winner = ("model_a", "model_b", "tie")[number % 3]
        rows.append({"model_a": first, "model_b": second, "winner": winner, "length_a": 10 + number, "length_b": 40})
    rows.append({"model_a": "A", "model_b": "D", "winner": "model_a", "length_a": 1, "length_b": 1})
    file = tmp_path / "battles.json"
    file.write_text(json.dumps(rows))
    options = ("--length", "--anchor", "B", "--exclude", "D", "--confidence", 0.9, "-o", tmp_path / "out.jsonl")
    code, out, err = run(capsys, "rank", "--data", file, *options)
    assert code == 0, err
    assert "effect of length" in out
    assert "90% interval" in out
    by_model = {record["model"]: record for record in lines(tmp_path / "out.jsonl")}
    assert by_model.keys() == {"A", "B", "C"}
    assert (by_model["B"]["rating"], by_model["B"]["rating_lower"]) == (1000, 1000)


@pytest.mark.parametrize(
    ("text", "more", "message"),
    [
        ("A>B C>D", (), "must connect all models, got 2 groups"),
        ("A>B B>C A>C", (), "winning every comparison with"),
        ("A>B B>A", ("--length",), "they have no lengths of responses"),
        ("A>B B>A", ("--anchor", "Z"), "anchor must be one of ['A', 'B'], got 'Z'"),
        ("A>B B>A", ("--exclude", "A"), "at least one comparison, got none"),
        ("A>B B>A", ("--exclude", "Z"), "got 'Z'"),
        ("A>B B>A", ("--cluster", "topic"), "cluster must be one of the columns"),
        ("A>B B>A", ("--columns", "winner=result"), "without 'result'"),
        ("A>B B>A", ("--columns", "prompt=result"), "got 'prompt'"),
        ("A>B B>A", ("--confidence", "95"), "confidence must be between 0 and 1, got 95.0"),
        ("A>B B>A", ("--reference", "x"), "reference must not be given without --models, got 'x'"),
        ("A>B B>A", ("--max_length", "5"), "max_length must not be given without --models"),
        ("A>B B>A", ("--nonsense",), "--nonsense"),
        ("", (), "must not be empty"),
    ],
)
def test_comparisons_that_cannot_be_ranked_are_refused_and_nothing_is_written(capsys, tmp_path, text, more, message):
    file, out_file = battles(tmp_path / "battles.jsonl", text), tmp_path / "out.jsonl"
    code, _, err = run(capsys, "rank", "--data", file, "-o", out_file, *more)
    assert code == 2
    assert message in err
    assert [path.name for path in tmp_path.iterdir()] == ["battles.jsonl"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--by", "reference"), "by must be 'sum' or 'mean' without a reference"),
        (("--by", "length"), "argument --by"),
        (("--length",), "length must not be given with --models, got True"),
        (("--reference", "/nowhere"), "got /nowhere, which does not exist"),
        (("--anchor", "Z"), "anchor must be one of"),
        (("--max_length", "0"), "max_length"),
        (("-o", "."), "output must be a file, got the folder ."),
        (("--columns", "promt=question"), "got 'promt'; did you mean 'prompt'"),
    ],
)
def test_models_that_cannot_be_ranked_are_refused(capsys, pairs, more, message):
    code, _, err = rank_pairs(capsys, pairs, *more)
    assert code == 2
    assert message in err


def test_models_and_data_that_are_not_there_are_refused_before_anything_is_loaded(capsys, pairs):
    code, _, err = run(capsys, "rank", "--models", pairs / "one", pairs / "tow", "--data", pairs / "pairs.jsonl")
    assert code == 2
    assert f"did you mean '{pairs / 'two'}'" in err
    code, _, err = run(capsys, "rank", "--models", pairs / "one", pairs / "one", "--data", pairs / "pairs.jsonl")
    assert code == 2
    assert "twice" in err
    code, _, err = run(capsys, "rank", "--models", pairs / "one", pairs / "two", "--data", pairs / "pair.jsonl")
    assert code == 2
    assert "does not exist" in err
    code, _, err = run(capsys, "rank", "--data", pairs / "pairs.jsonl")  # without models it is no file of comparisons
    assert code == 2
    assert "without 'model_a'" in err
    assert "--models A B" in err


def test_help_is_fast_and_lists_only_what_is_read():
    code = "import sys; from fastdpo.cli.main import main\ntry: main(['rank', '--help'])\nexcept SystemExit: pass\n"
    code += "print([name for name in ('torch', 'numpy', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    shown = set(re.findall(r"^  (?:-o(?: FILE)?, )?--([a-z_0-9]+)", done.stdout, flags=re.MULTILINE))
    assert {"data", "models", "reference", "by", "wins", "cluster", "length", "output", "html", "bf16"} <= shown
    assert not shown & {"dataset", "learning_rate", "beta", "output_dir", "save_strategy"}
