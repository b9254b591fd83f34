"""`fastdpo iterate` raises a reward that the judge can see, and keeps what each round made."""

import json

import pytest
import torch
from cli_runs import run
from tiny import CHAT_TEMPLATE, WORDS, save_model

from fastdpo.rounds import generate


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
    page = (paths / "out" / "iterate.html").read_text()
    for file in ("start_answers.json", "round_1/answers.json"):
        answers = json.loads((paths / "out" / file).read_text())
        assert len(answers["answers"]) == 10
        assert answers["answers"][0] in page
        assert answers["prompts"][0].strip() in page
    model = paths / "out" / "round_1" / "model" / "model.safetensors"
    written = model.stat().st_mtime_ns
    code, _, err = run(capsys, *options(paths, *TRAINING, "--ref_cache_dir", paths / "cache"))
    assert code == 0, err
    assert model.stat().st_mtime_ns == written


def test_the_chat_template_and_the_dtype_of_training_are_those_of_generation_too(capsys, paths, monkeypatch):
    (paths / "model" / "chat_template.jinja").unlink()
    (paths / "chat.jinja").write_text(CHAT_TEMPLATE)
    prompts = [{"prompt": [{"role": "user", "content": word}]} for word in WORDS[:14]]
    (paths / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    found, sampled = [], generate.sample_ids

    def sample_ids(model, tokenizer, *rest):
        found.append((model.dtype, tokenizer.chat_template))
        return sampled(model, tokenizer, *rest)

    monkeypatch.setattr(generate, "sample_ids", sample_ids)
    more = ("--chat_template", paths / "chat.jinja", "--dtype", "bfloat16", "--ref_cache_dir", paths / "cache")
    code, _, err = run(capsys, *options(paths, *TRAINING, "--num_train_epochs", "1", *more))
    assert code == 0, err
    assert found == [(torch.bfloat16, CHAT_TEMPLATE)]
    [row, *_] = [json.loads(line) for line in (paths / "out" / "round_1" / "pairs.jsonl").read_text().splitlines()]
    assert row["chosen"][0]["role"] == "assistant"
    assert row["sampling"]["seed"] == 100_000


def test_later_rounds_train_the_adapter_of_the_first_further(capsys, paths):
    """--use_peft is for a start that is a whole model; the second round starts from an adapter."""
    pytest.importorskip("peft")
    lora = ("--use_peft", "--lora_r", "4", "--rounds", "2", "--ref_cache_dir", paths / "cache")
    code, out, err = run(capsys, *options(paths, *TRAINING, *lora))
    assert code == 0, err
    folders = [paths / "out" / f"round_{n}" / "model" for n in (1, 2)]
    adapters = [json.loads((folder / "adapter_config.json").read_text()) for folder in folders]
    assert [(a["r"], a["base_model_name_or_path"]) for a in adapters] == [(4, str(paths / "model"))] * 2
    assert f"{folders[0]} is an adapter: it is trained further" in " ".join(out.split())
    first, second = (json.loads((folder.parent / "manifest.json").read_text()) for folder in folders)
    assert second["trained"]["start"] == str(folders[0])
    assert second["trained"]["reference"] == str(paths / "model")
    assert 0 < first["metrics"]["kl"] != second["metrics"]["kl"]


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (("--dataset", "x"), "--dataset must not be given"),
        (("--rounds", "0"), "rounds must be at least 1"),
        (("--eval_prompts", "30"), "prompts must hold more than eval_prompts"),
        (("--judge", "http://x/v1"), "judge_model must name"),
        (("--lerning_rate", "1"), "--lerning_rate"),
        (("--learning_rate", "-1"), "learning_rate must be"),
        (("--pairs", "best"), "pairs must be one of"),
        (("--judge_timeout", "0"), "judge_timeout must be > 0"),
    ],
)
def test_what_cannot_be_used_is_said_in_a_line(capsys, paths, more, word):
    code, _, err = run(capsys, *options(paths, *more))
    assert code == 2
    assert word in err
    assert not (paths / "out").exists()
