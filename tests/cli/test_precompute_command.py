"""`fastdpo precompute` writes what `fastdpo train` then finds."""

import json
import re

import pytest
from tiny import make_llama, make_rows, make_tokenizer

from fastdpo.cli.main import main


@pytest.fixture
def paths(tmp_path):
    """A model, a larger reference, and 20 pairs of which 19 can be used."""
    make_llama(vocab_size=64).save_pretrained(tmp_path / "model")
    make_llama(vocab_size=64, seed=3, num_hidden_layers=5).save_pretrained(tmp_path / "large")
    for name in ("model", "large"):
        make_tokenizer().save_pretrained(tmp_path / name)
    rows = make_rows(20)
    rows[3]["chosen"] = ""
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def run(capsys, paths, command, *more):
    """Exit code and everything printed, on one line."""
    common = ("--model", paths / "model", "--dataset", paths / "pairs.jsonl", "--ref_cache_dir", paths / "cache")
    settings = ("--use_cpu", "true", "--eval_fraction", 0.2, "--disable_tqdm", "true")
    code = main([str(argument) for argument in (command, *common, *settings, *more)])
    captured = capsys.readouterr()
    return code, " ".join((captured.out + captured.err).split())


def train(capsys, paths, *more):
    options = ("--output_dir", paths / "out", "--max_steps", 2, "--save_strategy", "no", "--overwrite_output_dir")
    return run(capsys, paths, "train", *options, "--per_device_train_batch_size", 4, "--reference", "cached", *more)


def test_help_lists_what_is_read_and_nothing_else(capsys):
    with pytest.raises(SystemExit):
        main(["precompute", "--help"])
    out = capsys.readouterr().out
    shown = set(re.findall(r"^  --([a-z_0-9]+)", out, flags=re.MULTILINE))
    for name in (
        "model",
        "dataset",
        "ref_model",
        "ref_cache_dir",
        "max_length",
        "packing",
        "bf16",
        "config",
        "use_cpu",
    ):
        assert name in shown, name
    for name in ("output_dir", "learning_rate", "beta", "save_strategy", "lora_r", "dataset_streaming"):
        assert name not in shown, name
    assert "usage: fastdpo precompute --model MODEL --dataset DATASET [--config FILE] [options]" in " ".join(
        out.split()
    )
    assert "everything else" not in out
    assert "all options of `fastdpo train` are taken" in " ".join(out.split())


def test_training_finds_what_was_computed_ahead(capsys, paths):
    code, out = run(capsys, paths, "precompute")
    assert code == 0, out
    for fact in (
        "LlamaForCausalLM",
        "empty response",
        "15 rows: 15 computed",
        "4 rows: 4 computed",
        str(paths / "cache"),
    ):
        assert fact in out, fact
    code, out = train(capsys, paths)
    assert code == 0, out
    assert "train 15 rows: 15 found; eval 4 rows: 4 found" in out
    code, out = run(capsys, paths, "precompute")
    assert code == 0, out
    assert "15 rows: 15 found" in out


def test_another_split_and_an_adapter_find_it_too(capsys, paths):
    assert run(capsys, paths, "precompute")[0] == 0
    code, out = train(capsys, paths, "--seed", 7, "--eval_fraction", 0, "--use_peft")
    assert code == 0, out
    assert "train 19 rows: 19 found" in out


def test_settings_that_change_the_numbers_do_not(capsys, paths):
    assert run(capsys, paths, "precompute")[0] == 0
    code, out = train(capsys, paths, "--bf16", "true")
    assert code == 0, out
    assert "train 15 rows: 15 computed" in out


def test_a_reference_larger_than_memory_is_offloaded_and_found(capsys, paths):
    large = ("--ref_model", paths / "large", "--ref_max_memory", '{"cpu": "100KB"}')
    code, out = run(capsys, paths, "precompute", *large)
    assert code == 0, out
    assert "offloaded" in out
    code, out = train(capsys, paths, *large)
    assert code == 0, out
    assert "train 15 rows: 15 found" in out


def test_a_config_file_of_a_run_serves_both(capsys, paths):
    (paths / "run.yaml").write_text(
        f"model: {paths / 'model'}\ndataset: {paths / 'pairs.jsonl'}\noutput_dir: {paths / 'out'}\nmax_steps: 2\n"
        f"use_cpu: true\nreference: cached\nref_cache_dir: {paths / 'cache'}\nsave_strategy: 'no'\n"
    )
    assert main(["precompute", "--config", str(paths / "run.yaml")]) == 0
    assert not (paths / "out").exists()
    assert not (paths / "not_used").exists()
    capsys.readouterr()
    assert main(["train", "--config", str(paths / "run.yaml")]) == 0
    assert "18 found" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--reference_free", "true"), "no reference to compute with"),
        (("--ref_model", "/nowhere"), "got /nowhere, which does not exist"),
        (("--ref_max_memory", "[1]"), "ref_max_memory must be a JSON object"),
        (("--ref_tokens_per_batch", "0"), "ref_tokens_per_batch must be an integer >= 1"),
    ],
)
def test_mistakes_are_named(capsys, paths, options, message):
    code, out = run(capsys, paths, "precompute", *options)
    assert code == 2
    assert message in out
