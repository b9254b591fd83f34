"""`fastdpo score` from the command line, stopped and gone on with, and with what it cannot use."""

import json

import pytest
from cli_runs import run, save_rows, short
from kills import killed, written_from_now_on
from tiny import save_model

from fastdpo import DPOConfig
from fastdpo.references import precompute
from fastdpo.rewards.implicit import implicit_reward
from fastdpo.training.setup import reference


@pytest.fixture
def paths(tmp_path):
    save_model(tmp_path / "policy", seed=1)
    save_model(tmp_path / "start", seed=2)
    save_rows(tmp_path / "pairs.jsonl", 6)
    return tmp_path


def options(paths, *more):
    common = ("score", "--model", paths / "policy", "--data", paths / "pairs.jsonl", "--use_cpu")
    return (*common, "--ref_cache_dir", paths / "cache", *more)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_table_and_page(capsys, paths, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(paths / "cache"))  # log-probs that are cached have no bar
    more = ("--reference", paths / "start", "-o", paths / "out" / "scores.jsonl", "--per_token")
    code, out, err = run(capsys, *options(paths, *more, "--html", paths / "page.html", "--beta", 0.5))
    assert code == 0, err
    assert "sum over tokens" in out
    assert "kept 6 of 6 pairs" in out
    assert "p95" not in out  # the report's token statistics are a table of their own, which does not fit a caption
    assert f"Log-probs under {paths / 'policy'} (data)" in err
    assert f"Log-probs under {paths / 'start'} (data)" in err
    assert "Log-probs by token: 100%" in err  # the second pass over the models, which takes as long as the first
    written = lines(paths / "out" / "scores.jsonl")
    assert [record["row"] for record in written] == list(range(6))
    for record in written:
        expected = [0.5 * (a - b) for a, b in zip(record["logps"], record["ref_logps"], strict=True)]
        assert record["rewards"] == pytest.approx(expected)
        sums = [sum(value for _, value in credits) for credits in record["credits"]]
        assert sums == pytest.approx(record["rewards"], rel=1e-4, abs=1e-5)
    page = (paths / "page.html").read_text()
    assert page.count('class="coloured"') == 12
    assert "http" not in page.replace("http-equiv", "")  # self-contained


def test_lines_hold_the_texts_in_the_order_of_their_rewards_and_the_next_command_reads_them(capsys, paths):
    row = {"prompt": "the ", "responses": ["cat sees", "dog", "a bird"], "scores": [1, 2, 3]}
    (paths / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    code, _, err = run(capsys, *options(paths, "-o", paths / "scores.jsonl"))
    assert code == 0, err
    [record] = lines(paths / "scores.jsonl")
    assert record["responses"] == ["a bird", "dog", "cat sees"]  # best first, as rankings are read
    expected = implicit_reward(str(paths / "policy"), beta=0.1, args=DPOConfig("out", max_length=None, use_cpu=True))
    assert record["rewards"] == pytest.approx(expected(["the "] * 3, record["responses"]), rel=1e-4)
    data = ("--dataset", paths / "scores.jsonl", "--output_dir", paths / "out", "--ref_cache_dir", paths / "cache")
    code, _, err = run(capsys, "train", "--model", paths / "policy", *data, *short())
    assert code == 0, err


def test_the_best_of_n_of_responses_without_scores(capsys, paths):
    rows = [
        {"prompt": "the ", "responses": ["cat sees", "dog", "a bird"]},
        {"prompt": "a ", "responses": ["dog", "tree"]},
    ]
    (paths / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = run(capsys, *options(paths, "-o", paths / "scores.jsonl", "--best", paths / "best.jsonl"))
    assert code == 0, err
    assert "no preferences, so no accuracy" in " ".join(out.split())
    assert "best of 2 to 3 responses" in out
    scored, best = lines(paths / "scores.jsonl"), lines(paths / "best.jsonl")
    assert [record["responses"] for record in scored] == [row["responses"] for row in rows]
    assert [record["preferences"] for record in scored] == [[], []]
    for record, picked in zip(scored, best, strict=True):
        assert picked["reward"] == max(record["rewards"])
        assert picked["completion"] == record["responses"][record["rewards"].index(picked["reward"])]
    data = ("--dataset", paths / "best.jsonl", "--output_dir", paths / "out")
    code, _, err = run(capsys, "sft", "--model", paths / "policy", *data, *short())
    assert code == 0, err


def test_json_has_the_summary(capsys, paths):
    code, out, _ = run(capsys, *options(paths, "--json"))
    assert code == 0
    summary = json.loads(out)["summaries"][0]
    assert summary["num_pairs"] == 6
    assert summary["interval"][0] <= summary["accuracy"] <= summary["interval"][1]


def test_a_benchmarks_file_is_scored_by_subset(capsys, paths):
    example = {"prompt": "the cat", "chosen": "sees", "rejected": "a dog never", "subset": "donotanswer"}
    (paths / "pairs.jsonl").write_text(json.dumps(example) + "\n")
    code, out, err = run(capsys, *options(paths, "--benchmark", "rewardbench"))
    assert code == 0, err
    assert "donotanswer" in out
    assert "Safety" in out


def test_a_killed_run_goes_on_where_it_was(capsys, paths, monkeypatch):
    """Nothing half-written is left, and what was computed is not computed again."""
    monkeypatch.setattr(precompute, "_SECONDS_PER_SHARD", 0.0)  # a shard after every batch
    monkeypatch.setattr(reference, "_TOKENS_PER_BATCH_ELSEWHERE", 40)
    save_rows(paths / "pairs.jsonl", 16)
    words = options(paths, "-o", paths / "scores.jsonl")
    killed(words, "fastdpo.references.cache:LogpsCache.write", 2, after=True)
    assert len(list((paths / "cache").rglob("*.safetensors"))) == 2
    assert not (paths / "scores.jsonl").exists()
    written = written_from_now_on(monkeypatch)
    code, _, err = run(capsys, *words)
    assert code == 0, err
    num_resumed = len(written)
    assert run(capsys, *words[:-1], paths / "whole.jsonl", "--ref_cache_dir", paths / "fresh")[0] == 0
    assert 0 < num_resumed < len(written) - num_resumed
    assert len(lines(paths / "scores.jsonl")) == 16
    assert lines(paths / "scores.jsonl") == lines(paths / "whole.jsonl")


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (("--beta", "0"), "beta must be > 0, got 0.0"),
        (("--reference", "no/such/model"), "no/such/model"),
        (("--data", "no_such_file.jsonl"), "no_such_file.jsonl"),
        (("--benchmark", "rewardbench"), "rewardbench must have the columns"),
        (("--examples", "0"), "examples must be at least 1, got 0"),
        (("--modl", "x"), "--modl"),
    ],
)
def test_what_cannot_be_used_is_said_in_a_line(capsys, paths, more, word):
    code, _, err = run(capsys, *options(paths, *more))
    assert code == 2
    assert word in err
    assert "Traceback" not in err
