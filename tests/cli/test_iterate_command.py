"""`fastdpo iterate` raises a reward that the judge can see, and keeps what each round made."""

import json

import pytest
from cli_runs import run
from tiny import WORDS, save_model


@pytest.fixture
def paths(tmp_path):
    save_model(tmp_path / "model", vocab_size=27)
    prompts = [{"prompt": f"{first} {second} "} for first in WORDS[:6] for second in WORDS[:4]]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    return tmp_path


def options(paths, *more):
    common = ("iterate", "--model", paths / "model", "--prompts", paths / "prompts.jsonl", "--use_cpu")
    small = ("--judge", "regex:never", "-n", "12", "--max_new_tokens", "8", "--eval_prompts", "10", "--rounds", "1")
    return (*common, *small, "--output_dir", paths / "out", *more)


TRAINING = (
    *("--learning_rate", "1e-2", "--num_train_epochs", "8", "--save_strategy", "no", "--report_to", "none"),
    *("--disable_tqdm", "true", "--per_device_train_batch_size", "4", "--beta", "0.1"),
)


def test_rounds_are_run_measured_and_not_run_again(capsys, paths):
    code, out, err = run(capsys, *options(paths, *TRAINING, "--ref_cache_dir", paths / "cache"))
    assert code == 0, err
    assert "win rate against the start" in out
    manifests = [json.loads((paths / "out" / f"round_{n}" / "manifest.json").read_text()) for n in (0, 1)]
    before, after = (manifest["metrics"] for manifest in manifests)
    assert (before["kl"], before["win_rate"]) == (0.0, 0.5)
    assert after["kl"] > 0
    assert after["reward"] > 2 * before["reward"]  # the judge counts a word, and the model says it more often
    assert (paths / "out" / "iterate.html").exists()
    model = paths / "out" / "round_1" / "model" / "model.safetensors"
    written = model.stat().st_mtime_ns
    code, _, err = run(capsys, *options(paths, *TRAINING, "--ref_cache_dir", paths / "cache"))
    assert code == 0, err
    assert model.stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (("--dataset", "x"), "--dataset must not be given"),
        (("--rounds", "0"), "rounds must be at least 1"),
        (("--eval_prompts", "30"), "prompts must hold more than eval_prompts"),
        (("--judge", "http://x/v1"), "judge_model must name"),
        (("--lerning_rate", "1"), "--lerning_rate"),
    ],
)
def test_what_cannot_be_used_is_said_in_a_line(capsys, paths, more, word):
    code, _, err = run(capsys, *options(paths, *more))
    assert code == 2
    assert word in err
