"""`fastdpo sweep` trains every combination, computes the reference once, and ends with one table."""

import json

import pytest
from cli_runs import run, save_model, save_rows, short


@pytest.fixture
def paths(tmp_path):
    save_model(tmp_path / "model")
    save_rows(tmp_path / "pairs.jsonl", 12)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the cat "}\n{"prompt": "a dog "}\n{"prompt": "today "}\n')
    return tmp_path


def options(paths, *more):
    common = ("sweep", "--model", paths / "model", "--dataset", paths / "pairs.jsonl", "--output_dir", paths / "out")
    return (*common, "--ref_cache_dir", paths / "cache", *short(), *more)


def test_runs_results_and_frontier(capsys, paths):
    judged = ("--judge", "length", "--eval_prompts", paths / "prompts.jsonl", "--max_new_tokens", "4")
    more = ("--param", "beta=0.1,0.5", "--learning_rate", "1e-2", *judged)
    code, out, err = run(capsys, *options(paths, *more))
    assert code == 0, err
    lines = [json.loads(line) for line in (paths / "out" / "results.jsonl").read_text().splitlines()]
    assert [line["params"]["beta"] for line in lines] == ["0.1", "0.5"]
    assert all(line["kl"] > 0 for line in lines)
    assert (paths / "out" / "beta=0.5" / "model.safetensors").exists()
    page = (paths / "out" / "sweep.html").read_text()
    for file in ("start_answers.json", "beta=0.5/answers.json"):
        answers = json.loads((paths / "out" / file).read_text())
        assert len(answers["answers"]) == 3
        assert answers["answers"][0] in page
    scores = json.loads((paths / "out" / "start_answers.json").read_text())["scores"]
    assert f"{sum(scores) / 3:.3f} ±" in page
    assert out.count("cached:") == 2
    assert "train 11 rows: 11 computed" in out  # by the first run, and found by the second
    assert "train 11 rows: 11 found" in out
    written = (paths / "out" / "start_answers.json").stat().st_mtime_ns
    code, out, _ = run(capsys, *options(paths, *more))
    assert code == 0
    assert "optimizer steps" not in out  # nothing is trained again
    assert (paths / "out" / "start_answers.json").stat().st_mtime_ns == written  # and nothing measured


def test_a_dry_run_prints_the_commands_and_which_runs_fit(capsys, paths):
    grid = ("--param", "loss_type=sigmoid,ipo", "--param", "bf16=true,false")
    code, out, err = run(capsys, *options(paths, *grid, "--dry_run", "--gpu_memory", "24GB"))
    assert code == 0, err
    assert "--loss_type ipo --bf16 true" in out
    assert [line.split()[-1] for line in out.splitlines() if " MB " in line] == ["yes"] * 4
    assert not (paths / "out").exists()
    code, out, err = run(capsys, *options(paths, *grid, "--dry_run", "--gpu_memory", "600MB"))  # CUDA takes more
    assert code == 0, err
    assert [line.split()[-1] for line in out.splitlines() if " MB " in line and "GPU" not in line] == ["no"] * 4


def test_a_dry_run_without_an_amount_plans_for_the_device(capsys, paths):
    code, out, err = run(capsys, *options(paths, "--param", "beta=0.1", "--dry_run"))
    assert code == 0, err
    assert "this machine's memory" in out
    assert [line.split()[-1] for line in out.splitlines() if " MB " in line and "machine" not in line] == ["yes"]


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (("--param", "bta=0.1"), "--bta"),
        (("--param", "beta=0.1", "--beta", "0.2"), "param must not name an option that is set for all runs, got beta"),
        (("--param", "beta=0.1", "--judge", "length"), "eval_prompts must be given"),
        ((), "param must be given"),
        (("--param", "beta=0.1,-1"), "beta must be"),
        (("--param", "beta=0.1", "--gpu_memory", "24GB"), "gpu_memory must be given with --dry_run"),
        (("--param", "beta=0.1", "--dry_run", "--gpu_memory", "much"), "gpu_memory must be an amount like 24GB"),
    ],
)
def test_what_cannot_be_used_is_said_in_a_line(capsys, paths, more, word):
    code, _, err = run(capsys, *options(paths, *more))
    assert code == 2
    assert word in err
    assert not (paths / "out").exists()
