"""`fastdpo plan` finds settings that fit an amount of memory, from a config alone."""

import json
import shlex

import pytest
from tiny import make_llama

from fastdpo.cli import plan as command
from fastdpo.cli.arguments import AdapterArguments, RunArguments, parse
from fastdpo.cli.main import main
from fastdpo.training import DPOConfig
from fastdpo.training.memory.card import plans as plan
from fastdpo.training.memory.cluster.plans import make_cluster_plans
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
def estimates(folder):
    return plan.Estimates(command.load_config(str(folder)), 8)


@pytest.fixture(scope="module")
def plans(estimates):
    return {memory: estimates.plans(memory * MIB, 256) for memory in (800, 1000)}


@pytest.mark.slow
def test_what_is_planned_fits_and_little_more_would(estimates, plans):
    for memory, found in plans.items():
        usable = memory * MIB * plan.USABLE_SHARE
        assert all(p.tokens > 0 for p in found)
        assert all(p.estimate.total <= usable for p in found)
        for p in found:
            estimate = dict(estimates.candidates)[p.settings]
            assert estimate(p.settings, p.tokens, p.workspace_bytes) == p.estimate
            assert estimate(p.settings, int(p.tokens * 1.1) + 256).total > usable, p.settings


@pytest.mark.slow
def test_more_memory_checkpointing_and_no_second_model_take_longer_pairs(plans):
    for little, much in zip(plans[800], plans[1000], strict=True):
        assert little.tokens < much.tokens
    tokens = {p.settings: p.tokens for p in plans[800]}
    for settings, found in tokens.items():
        if not settings.checkpointing:
            assert found < tokens[plan.replace(settings, checkpointing=True)]
        if settings.every_n_layers > 1:
            every = plan.replace(settings, every_n_layers=1)
            assert tokens[plan.replace(every, checkpointing=False)] < found <= tokens[every]
        if settings.tiles and not settings.offload:
            assert tokens[plan.replace(settings, tiles=False)] < found


@pytest.mark.slow
def test_checkpoints_on_the_host_take_longer_pairs_where_there_are_more_than_the_two_that_stay(tmp_path):
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "max_position_embeddings": 4096}
    make_llama(vocab_size=4000, **shape).config.save_pretrained(tmp_path)
    found = plan.Estimates(command.load_config(str(tmp_path)), 8).plans(800 * MIB, 256)
    tokens = {p.settings: p.tokens for p in found}
    offloaded = [settings for settings in tokens if settings.offload]
    assert len(offloaded) == 6
    for settings in offloaded:
        assert tokens[settings] > (1.2 if settings.tiles else 1.1) * tokens[plan.replace(settings, offload=False)]
        if settings.reference == "frozen":
            assert found <= tokens[plan.replace(settings, reference="cached")]


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_table_names_settings_and_what_to_type(capsys, folder):
    code, out, _ = run(capsys, folder, "900MiB", "--max_length", 512)
    assert code == 0
    shown = " ".join(out.split())
    for fact in (
        "qlora",
        "adamw_torch_fused",
        "longest pair",
        "4,096 tokens",
        "fastdpo train",
        "--max_length 512 --bf16 true",
        "64 pairs of 683 tokens on one h100",
        "40% of the GPU's bf16 FLOPs",
        "fits a pair of 683 tokens",
    ):
        assert fact in shown, fact
    lines = [line for line in out.splitlines() if "fastdpo train" in line]
    assert ["--use_peft" in line for line in lines].count(True) == 2  # LoRA and QLoRA, and training of all weights
    assert ["--load_in_4bit" in line for line in lines].count(True) == 1
    assert all(("fastdpo[quant]" in line) == ("4bit" in line or "bnb" in line or "paged" in line) for line in lines)


@pytest.mark.slow
def test_the_options_of_every_plan_are_those_of_train(capsys, folder):
    code, out, _ = run(capsys, folder / "config.json", "1GB", "--json")
    assert code == 0
    records = json.loads(out)
    assert {record["method"] for record in records} == {"full", "lora", "qlora"}
    for record in records:
        assert sum(record["bytes"].values()) == 2 * record["bytes"]["total"]
        required = ["--model", "m", "--dataset", "d", "--output_dir", "o", "--use_cpu", "true"]
        options = shlex.split(record["options"].replace(" --activation_offloading true", ""))  # GPU only
        assert ("--activation_offloading" in record["options"]) == record["activation_offloading"]
        _, adapter, args = parse("train", [RunArguments, AdapterArguments, DPOConfig], [*required, *options])
        in_backward = record["optimizer_in_backward"]
        assert args.max_tokens_per_microbatch == record["max_tokens_per_microbatch"]
        assert record["max_tokens_per_microbatch"] == (None if in_backward else record["longest_pair_tokens"])
        assert (args.optimizer_in_backward, args.weight_rounding) == (in_backward, record["weight_rounding"])
        assert args.gradient_checkpointing == record["gradient_checkpointing"]
        assert args.tile_rows == record["tile_rows"]
        if record["every_n_layers"] > 1:
            assert args.activation_checkpointing_kwargs == {"every_n_layers": record["every_n_layers"]}
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


@pytest.mark.slow
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


@pytest.fixture(scope="module")
def kept_estimates(folder):
    """Dry runs take seconds: they are made once for all tests that ask for this model."""
    return plan.Estimates(command.load_config(str(folder)), 16)


@pytest.fixture
def estimated_once(monkeypatch, kept_estimates):
    monkeypatch.setattr(command, "Estimates", lambda config, lora_r: kept_estimates)
    few = kept_estimates.candidates[-4:]  # QLoRA with checkpoints, on the host, in tiles, and both
    monkeypatch.setattr(kept_estimates, "candidates", few)
    return few


def run_length(capsys, folder, *more):
    code = main(["plan", "--model", str(folder), *map(str, more)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_length_is_answered_with_what_each_setting_needs_and_the_smallest_gpu(capsys, folder, estimated_once):
    code, out, _ = run_length(capsys, folder, "--pair_tokens", 3000, "--json")
    assert code == 0
    found = json.loads(out)
    assert len(found) == len(estimated_once) == 4
    for record, (settings, estimate) in zip(found, estimated_once, strict=True):
        total = estimate(settings, 3000).total
        assert record["bytes"]["total"] == total
        assert record["needed_bytes"] == int(total / 0.95)
        assert record["smallest_gpu_bytes"] == 8_000_000_000
        assert (record["pair_tokens"], record["fits"]) == (3000, True)
        assert "--max_tokens_per_microbatch 3000" in record["options"]
    code, out, _ = run_length(capsys, folder, "--pair_tokens", 3000)
    assert code == 0
    lines = [line for line in out.splitlines() if "fastdpo train" in line]
    assert [line.split(":")[0].strip() for line in lines] == ["8 GB"]
    assert "--load_in_4bit" in lines[0]
    assert "--tile_rows" not in lines[0]  # the fastest of those that fit


def test_the_gpu_that_is_named_decides_what_fits_the_length(capsys, folder, estimated_once):
    needs = sorted(estimate(settings, 3000).total / 0.95 for settings, estimate in estimated_once)
    memory = f"{int(needs[1]) + 1}"
    found = json.loads(run_length(capsys, folder, "--pair_tokens", 3000, "--gpu_memory", memory, "--json")[1])
    assert sorted(record["fits"] for record in found) == [False, False, True, True]
    code, _, error = run_length(capsys, folder, "--pair_tokens", 3000, "--gpu_memory", "0.7GB")
    assert code == 2
    assert "pair_tokens must be fewer for 0.7GB, got 3000" in error
    assert "--on_oversized_row split" in error


def test_the_picture_is_a_page_and_a_png(capsys, folder, estimated_once, kept_estimates, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(kept_estimates, "candidates", estimated_once[:1])
    page, image = tmp_path / "new" / "plan.html", tmp_path / "plan.png"
    code, out, _ = run_length(capsys, folder, "--pair_tokens", 3000, "--html", page, "--png", image)
    assert code == 0
    assert [line for line in out.splitlines() if line.startswith("picture: ")] == [
        f"picture: {page}",
        f"picture: {image}",
    ]
    assert image.read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    for fact in ("Longest pair with QLoRA (4-bit base)", "Where the bytes go", ">checkpointing<", "fastdpo train"):
        assert fact in text, fact


@pytest.mark.slow
def test_lengths_read_off_the_lines_fit_and_grow_with_the_memory(estimated_once, kept_estimates):
    for settings, lengths in kept_estimates.longest([600 * MIB, 2000 * MIB, 8000 * MIB]):
        estimate = dict(kept_estimates.candidates)[settings]
        assert lengths[0] == 0 < lengths[1] < lengths[2]
        assert lengths[1] % 256 == 0
        assert estimate(settings, lengths[1]).total <= 2000 * MIB * 0.95
        assert estimate(settings, int(lengths[1] * 1.2) + 512).total > 2000 * MIB * 0.95


@pytest.mark.slow
def test_lengths_at_a_memory_that_was_planned_for_are_those_of_the_plan(estimated_once, kept_estimates):
    """A page shows both."""
    plans = {plan.settings: plan.tokens for plan in kept_estimates.plans(700 * MIB, 64)}
    for settings, (length,) in kept_estimates.longest([700 * MIB]):
        assert plans[settings] <= length <= 1.05 * plans[settings] + 256


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--pair_tokens", 3), "pair_tokens must be at least 4, got 3"),
        (("--pair_tokens", 3000, "--max_length", 9), "max_length must be absent if pair_tokens is given, got 9"),
        (("--pair_tokens", 3000, "--gpus", 2), "gpu_memory must be given, such as --gpu_memory 24GB"),
        ((), "without it, plan takes --pair_tokens"),
        (("--gpu_memory", "1GB", "--gpus", 2, "--html", "a.html"), "html must be absent for several GPUs"),
    ],
)
def test_lengths_and_pictures_that_cannot_be_are_refused_by_name(capsys, folder, arguments, message):
    code, _, error = run_length(capsys, folder, *arguments)
    assert code == 2
    assert message in error


def run_on_cluster(capsys, folder, *more):
    return run(capsys, folder, "1GB", "--gpus", 8, "--nodes", 2, "--max_length", 384, "--lora_r", 8, *more)


@pytest.fixture
def planned_once(monkeypatch):
    """Dry runs take seconds: plans are made once for the same arguments."""
    monkeypatch.setattr(command, "make_cluster_plans", _cluster_plans)


_found = {}


def _cluster_plans(config, *cluster, **settings):
    key = (repr(cluster), repr(settings))
    if key not in _found:
        _found[key] = make_cluster_plans(config, *cluster, **settings)
    return _found[key]


def test_several_gpus_get_a_table_of_ways_to_share_with_bytes_and_seconds(capsys, folder, planned_once):
    code, out, _ = run_on_cluster(capsys, folder)
    assert code == 0
    for name in ("DDP", "FSDP2", "HSDP", "TP 2 x FSDP2", "FSDP2 x SP 4"):
        assert sum(f" {name} " in line for line in out.splitlines() if " s" in line) >= 4, name
    for fact in ("longest pair", "network", "2 x 8 GPUs", "64 pairs of 512 tokens", "40% of the GPU's bf16 FLOPs"):
        assert fact in " ".join(out.split()), fact
    lines = [line for line in out.splitlines() if "fastdpo train" in line]
    assert ["--use_peft" in line for line in lines] == [False, True]
    assert all("--num_processes 16 --num_machines 2" in line for line in lines)


def test_records_of_several_gpus_name_what_to_type(capsys, folder, planned_once):
    code, out, _ = run_on_cluster(capsys, folder, "--json")
    assert code == 0
    found = json.loads(out)
    assert {(record["method"], record["reference"], record["gradient_checkpointing"]) for record in found} == {
        (*kind, checkpointing)
        for kind in (("full", "frozen"), ("full", "cached"), ("lora", "adapter"))
        for checkpointing in (False, True)
    }
    for record in found:
        assert (record["bytes"]["reference"] > 0) == (record["reference"] == "frozen")
        assert record["fits"]
        assert sum(record["bytes"].values()) == 2 * record["bytes"]["total"]
        step = record["step"]
        seconds = max(step["compute_s"], step["overlapped_network_s"])
        assert step["total_s"] == pytest.approx(seconds + step["blocking_network_s"] + step["optimizer_s"])
        options = record["options"]
        assert ("--sequence_parallel_size 4" in options) == ("SP 4" in record["layout"])
        assert ("--tensor_parallel_size 2" in options) == ("TP 2" in record["layout"])
        assert ("--use_peft" in options) == (record["method"] == "lora")
        assert f"--reference {record['reference']}" in options


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpus", 0), "gpus must be at least 1, got 0"),
        (("--gpus", 8, "--nodes", 0), "nodes must be at least 1, got 0"),
        (("--gpus", 8, "--interconnect", "nvlnk,ib400"), "got 'nvlnk'; did you mean 'nvlink'?"),
        (("--gpus", 8, "--nodes", 2, "--interconnect", "nvlink"), "interconnect must name the network inside a node"),
        (("--gpus", 8, "--gpu", "h1000"), "gpu must be one of"),
        (("--gpus", 8, "--pairs_per_step", 0), "pairs_per_step must be at least 1, got 0"),
        (("--gpus", "many"), "argument --gpus: invalid int value: 'many'"),
    ],
)
def test_a_cluster_that_cannot_be_is_refused_by_name(capsys, folder, arguments, message):
    code, _, error = run(capsys, folder, "1GB", *arguments)
    assert code == 2
    assert message in error


def test_a_cluster_that_is_too_small_is_told_what_it_takes(capsys, folder, monkeypatch):
    def none_fits(*arguments, **settings):
        return [plan.replace(found, tokens=0, time=None) for found in _cluster_plans(*arguments, **settings)]

    monkeypatch.setattr(command, "make_cluster_plans", none_fits)
    code, _, error = run_on_cluster(capsys, folder)
    assert code == 2
    assert "gpu_memory must be at least" in error
    assert "pairs of 512 tokens on 2 x 8 GPUs, got 1.0GB; that is" in error
    assert "use more GPUs" in error
