"""`fastdpo plan` finds settings that fit an amount of memory, from a config alone."""

import json
import shlex

import pytest
from tiny import make_llama

from fastdpo.cli import plan as command
from fastdpo.cli.arguments import AdapterArguments, RunArguments, parse
from fastdpo.cli.main import main
from fastdpo.training import DPOConfig
from fastdpo.training.memory import plan
from fastdpo.training.memory.estimate import CUDA_BYTES, MIB


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A config without weights."""
    path = tmp_path_factory.mktemp("model")
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2, "max_position_embeddings": 4096}
    make_llama(vocab_size=4000, **shape).config.save_pretrained(path)
    return path


def run(capsys, folder, memory, *more):
    code = main([str(argument) for argument in ("plan", "--model", folder, "--gpu-memory", memory, *more)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def plans(folder):
    config = command.load_config(str(folder))
    return {memory: plan.make_plans(config, memory * MIB, lora_r=8, least=256) for memory in (800, 1000)}


@pytest.mark.slow
def test_what_is_planned_fits_and_little_more_would(folder, plans):
    config = command.load_config(str(folder))
    for memory, found in plans.items():
        usable = memory * MIB * plan.USABLE_SHARE
        assert all(p.tokens > 0 for p in found)
        assert all(p.estimate.total <= usable for p in found)
        for p in found:
            estimate = plan._estimator(config, p.settings, 8)
            assert estimate(p.settings, p.tokens) == p.estimate
            assert estimate(p.settings, int(p.tokens * 1.1) + 256).total > usable, p.settings


def test_more_memory_checkpointing_and_no_second_model_take_longer_pairs(plans):
    for little, much in zip(plans[800], plans[1000], strict=True):
        assert little.tokens < much.tokens
    tokens = {p.settings: p.tokens for p in plans[800]}
    for settings, found in tokens.items():
        if not settings.checkpointing:
            assert found < tokens[plan.replace(settings, checkpointing=True)]
        if settings.reference == "frozen":
            assert found <= tokens[plan.replace(settings, reference="cached")]


def test_parts_are_those_of_the_settings(plans):
    numel = sum(p.numel() for p in make_llama(4000, hidden_size=256, intermediate_size=1024).parameters())
    for p in plans[1000]:
        settings, estimate = p.settings, p.estimate
        assert (estimate.reference > 0) == (settings.reference == "frozen")
        assert estimate.overhead == CUDA_BYTES
        if settings.method == "full":
            size = 4 if settings.weight_rounding == "nearest" else 2
            assert estimate.weights == pytest.approx(size * numel, rel=0.01)
            if settings.in_backward:
                assert estimate.gradients < size * numel
            else:
                assert estimate.gradients == pytest.approx(size * numel, rel=0.01)
        if settings.method == "lora":
            assert 2 * numel < estimate.weights < 2.5 * numel
        if settings.method == "qlora":  # embedding and head stay in bf16
            assert 2 * 2 * 4000 * 256 < estimate.weights < 2 * numel
        if settings.optim == "adamw_torch_fused" and settings.method == "full":
            assert estimate.optimizer == pytest.approx(8 * numel, rel=0.01)


def test_the_table_names_settings_and_what_to_type(capsys, folder):
    code, out, _ = run(capsys, folder, "900MiB", "--max_length", 512)
    assert code == 0
    for fact in (
        "qlora",
        "adamw_torch_fused",
        "longest pair",
        "4,096 tokens",
        "fastdpo train",
        "--max_length 512 --bf16 true",
    ):
        assert fact in out, fact
    lines = [line for line in out.splitlines() if "fastdpo train" in line]
    assert ["--use_peft" in line for line in lines].count(True) == 2  # LoRA and QLoRA, and training of all weights
    assert ["--load_in_4bit" in line for line in lines].count(True) == 1
    assert all(("fastdpo[quant]" in line) == ("4bit" in line or "bnb" in line or "paged" in line) for line in lines)


def test_the_options_of_every_plan_are_those_of_train(capsys, folder):
    code, out, _ = run(capsys, folder / "config.json", "1GB", "--json")
    assert code == 0
    records = json.loads(out)
    assert {record["method"] for record in records} == {"full", "lora", "qlora"}
    for record in records:
        assert sum(record["bytes"].values()) == 2 * record["bytes"]["total"]
        required = ["--model", "m", "--dataset", "d", "--output_dir", "o", "--use_cpu", "true"]
        options = shlex.split(record["options"])
        _, adapter, args = parse("train", [RunArguments, AdapterArguments, DPOConfig], [*required, *options])
        in_backward = record["optimizer_in_backward"]
        assert args.max_tokens_per_microbatch == record["max_tokens_per_microbatch"]
        assert record["max_tokens_per_microbatch"] == (None if in_backward else record["longest_pair_tokens"])
        assert (args.optimizer_in_backward, args.weight_rounding) == (in_backward, record["weight_rounding"])
        assert args.gradient_checkpointing == record["gradient_checkpointing"]
        assert (args.optim, args.reference) == (record["optim"], record["reference"])
        assert (adapter.use_peft, adapter.load_in_4bit) == (record["method"] != "full", record["method"] == "qlora")


@pytest.mark.slow
def test_settings_that_take_less_than_max_length_do_not_fit(capsys, folder):
    lengths = [record["longest_sequence_tokens"] for record in json.loads(run(capsys, folder, "800MiB", "--json")[1])]
    asked = sorted(lengths)[len(lengths) // 2] - 100
    code, out, _ = run(capsys, folder, "800MiB", "--max_length", asked, "--json")
    assert code == 0
    assert [record["fits"] for record in json.loads(out)] == [length >= asked for length in lengths]
    assert min(lengths) < asked < max(lengths)


@pytest.mark.parametrize(
    ("text", "value"),
    [("24GB", 24e9), ("24GiB", 24 * 2**30), ("24 G", 24e9), ("0.5MB", 5e5), ("80000mb", 8e10), ("1000", 1000)],
)
def test_amounts_of_memory(text, value):
    assert command.parse_bytes(text) == value


@pytest.mark.parametrize("text", ["many", "24XB", "-1GB", "0GB", "", "24iB", "nanGB"])
def test_an_amount_that_is_none_is_refused(capsys, folder, text):
    with pytest.raises(ValueError, match="gpu_memory must be an amount"):
        command.parse_bytes(text)


def test_a_model_that_fits_in_no_way_says_what_it_would_take(capsys, folder):
    code, _, err = run(capsys, folder, "600MB")
    assert code == 2
    assert "gpu_memory must be at least 0.7GB" in err or "gpu_memory must be at least 0.8GB" in err
    needed = err.split("at least ")[1].split(" ")[0]
    assert run(capsys, folder, f"{float(needed.removesuffix('GB')) + 0.05:.2f}GB")[0] == 0


def test_mistakes_are_reported_in_one_line(capsys, folder, tmp_path):
    for arguments, message in (
        (("plan", "--model", str(folder)), "--gpu_memory"),
        (("plan", "--model", str(tmp_path / "none"), "--gpu_memory", "1GB"), "model must be"),
        (("plan", "--model", str(folder), "--gpu_memory", "1GB", "--lora_r", "0"), "lora_r must be at least 1"),
        (("plan", "--model", str(folder), "--gpu_memory", "24"), "gpu_memory must be at least"),
    ):
        assert main(list(arguments)) == 2
        assert message in capsys.readouterr().err
