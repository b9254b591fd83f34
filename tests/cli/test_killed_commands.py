"""kill -9 in the middle of the long commands: started again, they end as if nothing had happened.

`score`, `rank` and `data clean` have their kills beside their other tests.
"""

import json

import pytest
from cli_runs import run, save_rows, short
from kills import killed
from safetensors.torch import load_file
from tiny import WORDS, save_model

from fastdpo.rounds import generate

TRAINING = "fastdpo.training.dpo:DPOTrainer.training_step"


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(generate, "CHUNK", 3)


@pytest.fixture
def paths(tmp_path):
    save_model(tmp_path / "model", vocab_size=27)
    prompts = [{"prompt": f"{word} "} for word in WORDS[:8]]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    save_rows(tmp_path / "pairs.jsonl", 12)
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    return tmp_path


def both(capsys, monkeypatch, paths, words, where, call=1, **when):
    """Runs the command in the folder `whole`, and in `killed` with a kill in the middle. Returns both folders."""
    monkeypatch.chdir(paths / "killed")
    killed(words, where, call, **when)
    code, resumed, err = run(capsys, *words)
    assert code == 0, err
    monkeypatch.chdir(paths / "whole")
    code, expected, err = run(capsys, *words)
    assert code == 0, err
    return paths / "killed", paths / "whole", resumed, expected


def files(folder):
    """Names of all files that a user sees; hidden ones are what a kill left of a file that was being written."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))


@pytest.mark.parametrize(
    ("where", "call", "when"),
    [
        ("fastdpo.rounds.generate:append_lines", 2, {}),  # the second chunk was sampled and judged
        ("fastdpo.rounds.generate:append_lines", 2, {"after": True}),
        ("fastdpo.rounds.generate:sample_ids", 3, {}),
        ("os:replace", 1, {}),  # the pairs are written, under a hidden name
    ],
)
def test_generate(capsys, monkeypatch, paths, where, call, when):
    words = ("generate", "--model", "../model", "--prompts", "../prompts.jsonl", "--judge", "length", "--use_cpu")
    words += ("-n", "3", "--max_new_tokens", "5", "-o", "pairs.jsonl")
    resumed, whole, said, expected = both(capsys, monkeypatch, paths, words, where, call, **when)
    assert files(resumed) == files(whole) == ["pairs.jsonl", "pairs.jsonl.samples.jsonl"]
    for name in files(whole):
        assert (resumed / name).read_text() == (whole / name).read_text()
    assert said == expected


ITERATE = (
    *("iterate", "--model", "../model", "--prompts", "../prompts.jsonl", "--judge", "regex:a", "--output_dir", "out"),
    *("--rounds", "2", "--replay", "all", "-n", "8", "--max_new_tokens", "6", "--eval_prompts", "3", "--use_cpu"),
    *(
        "--learning_rate",
        "1e-2",
        "--num_train_epochs",
        "2",
        "--per_device_train_batch_size",
        "2",
        "--eval_fraction",
        "0",
    ),
    *("--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "2", "--report_to", "none"),
    *("--disable_tqdm", "true"),
)


@pytest.mark.parametrize(
    ("where", "call", "when"),
    [
        ("fastdpo.rounds.state:write_json", 2, {}),  # the start is measured, its manifest not written
        ("fastdpo.rounds.generate:append_lines", 2, {}),  # in the middle of the first round's samples
        ("fastdpo.cli.iterate:write_records", 1, {"after": True}),  # the pairs are written, the manifest not
        (TRAINING, 3, {}),  # in the first training, after a checkpoint
        ("fastdpo.cli.run:train_and_compare", 1, {"after": True}),  # trained and saved, the manifest not
        ("fastdpo.rounds.measure:kl_to_reference", 1, {}),  # while the first round's model is measured
        (TRAINING, 9, {}),  # in the second round
    ],
)
@pytest.mark.slow
def test_iterate(capsys, monkeypatch, paths, where, call, when):
    resumed, whole, said, expected = both(capsys, monkeypatch, paths, ITERATE, where, call, **when)
    assert said[said.index("held-out prompts") :] == expected[expected.index("held-out prompts") :]
    for name in ("start_answers.json", "round_0/manifest.json", "round_1/pairs.jsonl", "round_2/pairs.jsonl"):
        assert (resumed / "out" / name).read_text() == (whole / "out" / name).read_text()
    for number in (1, 2):
        name = f"out/round_{number}/manifest.json"
        assert json.loads((resumed / name).read_text()) == json.loads((whole / name).read_text())
        ours, theirs = (load_file(f / f"out/round_{number}/model/model.safetensors") for f in (resumed, whole))
        assert all(bool((ours[key] == theirs[key]).all()) for key in theirs)
    assert (resumed / "out" / "iterate.html").exists()


def sweep_words(*more):
    return (
        *("sweep", "--model", "../model", "--dataset", "../pairs.jsonl", "--output_dir", "out"),
        *("--param", "beta=0.1,0.5", "--judge", "regex:a", "--eval_prompts", "../prompts.jsonl"),
        *("--max_new_tokens", "5", "--ref_cache_dir", "cache", *short(), "--learning_rate", "1e-2"),
        *("--max_steps", "3", "--save_strategy", "steps", "--save_steps", "1", "--save_total_limit", "2", *more),
    )


@pytest.mark.parametrize(
    ("where", "call", "when"),
    [
        (TRAINING, 2, {}),  # in the first run, after a checkpoint
        ("fastdpo.rounds.measure:write_json", 1, {}),  # the start has answered
        ("fastdpo.rounds.sweep:append_lines", 1, {}),  # the first run is measured, its line not written
        (TRAINING, 5, {}),  # in the second run
        ("fastdpo.cli.sweep:_page", 1, {}),
    ],
)
@pytest.mark.slow
def test_sweep(capsys, monkeypatch, paths, where, call, when):
    resumed, whole, said, expected = both(capsys, monkeypatch, paths, sweep_words(), where, call, **when)
    assert said[said.index("2 runs") :] == expected[expected.index("2 runs") :]
    ours, theirs = (lines_without_times(folder / "out" / "results.jsonl") for folder in (resumed, whole))
    assert ours == theirs
    for beta in ("0.1", "0.5"):
        name = f"out/beta={beta}/model.safetensors"
        weights, expected_weights = load_file(resumed / name), load_file(whole / name)
        assert all(bool((weights[key] == expected_weights[key]).all()) for key in expected_weights)
    assert (resumed / "out" / "sweep.html").exists()


def lines_without_times(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        for key in [key for key in line["metrics"] if key.endswith(("_runtime", "_per_second"))]:
            del line["metrics"][key]
    return lines


def test_one_kill_of_each_command_that_trains(capsys, monkeypatch, paths):
    """The cheap part of the slow tests above."""
    one_round = tuple("1" if ITERATE[place - 1] == "--rounds" else word for place, word in enumerate(ITERATE))
    for words, name in ((one_round, "out/round_1/model"), (sweep_words(), "out/beta=0.5")):
        resumed, whole, _, _ = both(capsys, monkeypatch, paths, words, TRAINING, 2)
        ours, theirs = (load_file(folder / name / "model.safetensors") for folder in (resumed, whole))
        assert all(bool((ours[key] == theirs[key]).all()) for key in theirs)
        for folder in (resumed, whole):
            (folder / "out").rename(folder / f"of_{words[0]}")
