"""`fastdpo generate` makes pairs that `fastdpo train` trains on."""

import json

import pytest
from cli_runs import run, short
from tiny import WORDS, save_model

from fastdpo.rounds.endpoint import EndpointJudge


@pytest.fixture
def paths(tmp_path):
    save_model(tmp_path / "model", vocab_size=27)
    prompts = [{"prompt": f"{word} "} for word in WORDS[:6]]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    return tmp_path


def options(paths, *more):
    common = ("generate", "--model", paths / "model", "--prompts", paths / "prompts.jsonl", "--use_cpu")
    return (*common, "-o", paths / "pairs.jsonl", "-n", "3", "--max_new_tokens", "5", "--judge", "length", *more)


def test_pairs_are_made_told_and_trained_on(capsys, paths):
    code, out, err = run(capsys, *options(paths))
    assert code == 0, err
    assert "longer chosen" in out
    assert "100.0% of pairs" in out  # that is what this judge looks at
    rows = [json.loads(line) for line in (paths / "pairs.jsonl").read_text().splitlines()]
    assert all(len(row["chosen"]) > len(row["rejected"]) for row in rows)
    assert rows[0]["judge"] == "length"
    data = ("--model", paths / "model", "--dataset", paths / "pairs.jsonl", "--output_dir", paths / "out")
    code, _, err = run(capsys, "train", *data, *short("--ref_cache_dir", paths / "cache"))
    assert code == 0, err


def test_a_judge_that_always_takes_the_second_answer_is_told_from_one_that_finds_all_equal(capsys, paths, monkeypatch):
    asked = ("--judge", "http://127.0.0.1:9/v1", "--judge_model", "m")
    monkeypatch.setattr(EndpointJudge, "_verdict", lambda self, prompt, a, b: "B")
    code, _, err = run(capsys, *options(paths, *asked))
    assert code == 2
    assert "its verdicts in both orders agree in 0%, and 0 could not be read" in err
    monkeypatch.setattr(EndpointJudge, "_verdict", lambda self, prompt, a, b: "C")
    code, _, err = run(capsys, *options(paths, *asked, "-o", paths / "equal.jsonl"))
    assert code == 2
    assert "its verdicts in both orders agree in 100%" in err


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (("--judge", "lenght"), "judge must be one of"),
        (("--judge", "http://127.0.0.1:9/v1"), "judge_model must name"),
        (("--judge", "regex:nowhere"), "prompts must give at least one pair"),
        (("-n", "1"), "num_responses must be at least 2"),
        (("--prompts", "none.jsonl"), "none.jsonl"),
        (("--pairs", "best"), "--pairs"),
        (("--engine", "vllm"), "engine must be auto or transformers, got 'vllm', which is not installed"),
    ],
)
def test_what_cannot_be_used_is_said_in_a_line(capsys, paths, more, word):
    code, _, err = run(capsys, *options(paths, *more))
    assert code == 2
    assert word in err
    assert not (paths / "pairs.jsonl").exists()
