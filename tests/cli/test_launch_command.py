"""`--accelerate_config` and `--num_processes` start the run on several processes."""

import argparse
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from cli_runs import options_of, run, save_model, save_rows, short
from processes import on_processes

from fastdpo.cli.launch import start
from fastdpo.cli.launch.start import CONFIGS, STARTED, check_processes, group_words, launch, launcher_words
from fastdpo.cli.main import main


def asked(**options):
    names = (
        "accelerate_config",
        "num_processes",
        "num_machines",
        "machine_rank",
        "main_process_ip",
        "main_process_port",
    )
    return argparse.Namespace(**{name: options.get(name) for name in names})


def words_of_run(tmp_path, command):
    """Of a run on two processes that a file asks for."""
    save_model(tmp_path / "model")
    save_rows(tmp_path / "pairs.jsonl")
    (tmp_path / "run.yaml").write_text("accelerate_config: multi_gpu\nnum_processes: 2\n")
    options = ("--model", tmp_path / "model", "--dataset", tmp_path / "pairs.jsonl", "--output_dir", tmp_path / "out")
    return [str(w) for w in (command, "--config", tmp_path / "run.yaml", *options, *short("--eval_fraction", 0))]


def assert_one_model(printed, output_dir):
    assert "of 8 rows (4 x 1 accumulated x 2 processes)" in " ".join(printed.split())
    assert printed.count("saved in") == 1
    assert (output_dir / "model.safetensors").exists()
    assert options_of(output_dir)["num_processes"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "sft"])
def test_two_processes_train_one_model(tmp_path, command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    started = [sys.executable, "-m", "fastdpo", *words_of_run(tmp_path, command)]
    done = subprocess.run(started, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_one_model(done.stdout, tmp_path / "out")


WRITES_DOWN = """#!/bin/sh
printf '%s\\0' "$@" > {folder}/words$RANK
env -0 > {folder}/environment$RANK
"""


def written_down(folder, rank):
    words, environment = (
        (folder / f"{name}{rank}").read_text().removesuffix("\0").split("\0") for name in ("words", "environment")
    )
    return words, dict(line.split("=", 1) for line in environment)


def run_main(folder, words):
    return main(words)


def test_what_the_launcher_starts_trains_one_model(tmp_path, monkeypatch):
    """accelerate starts a script that writes down its words and environment; processes that have imported everything
    run the command with them."""
    script, folder = tmp_path / "script", tmp_path / "run"
    folder.mkdir()
    script.write_text(WRITES_DOWN.format(folder=tmp_path))
    script.chmod(0o755)
    monkeypatch.setenv("PYTHON_EXEC", str(script))  # which torchrun starts in place of Python
    given = words_of_run(tmp_path, "train")
    assert main(given) == 0
    of_processes = [written_down(tmp_path, rank) for rank in (0, 1)]
    for rank, (words, environment) in enumerate(of_processes):
        assert words == ["-u", "-m", "fastdpo", *given]
        assert (environment["RANK"], environment["WORLD_SIZE"], environment[STARTED]) == (str(rank), "2", "1")
    for name, value in environment.items():
        if name.startswith(("ACCELERATE_", "FASTDPO_")):
            monkeypatch.setenv(name, value)
    assert on_processes(run_main, [{"words": given}], folder) == [[0, 0]]
    assert_one_model("".join((folder / f"printed{rank}.txt").read_text() for rank in (0, 1)), tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_deepspeed_trains_as_one_process_does(tmp_path, name):
    pytest.importorskip("deepspeed")
    save_model(tmp_path / "model")
    save_rows(tmp_path / "pairs.jsonl")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    logs = []
    for folder, batch_size, options in (
        ("one", 8, ()),
        ("two", 4, ("--accelerate_config", name, "--num_processes", 2)),
    ):
        words = (
            "--model",
            tmp_path / "model",
            "--dataset",
            tmp_path / "pairs.jsonl",
            "--output_dir",
            tmp_path / folder,
        )
        more = short(
            "--eval_fraction", 0, "--max_steps", 3, "--per_device_train_batch_size", batch_size, "--logging_steps", 1
        )
        started = [sys.executable, "-m", "fastdpo", "train", *words, *more, *options]
        done = subprocess.run(
            [*map(str, started)], env=environment, capture_output=True, text=True, check=False, timeout=600
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert (tmp_path / folder / "model.safetensors").exists()
        state = json.loads((tmp_path / folder / "trainer_state.json").read_text())
        logs.append([entry["loss"] for entry in state["log_history"] if "loss" in entry])
    assert len(logs[0]) > 1
    assert logs[1] == pytest.approx(logs[0], rel=1e-5)  # three steps move it by 5e-5


def test_a_run_without_these_options_starts_no_process(monkeypatch):
    monkeypatch.setattr("subprocess.Popen", None)
    assert launch("train", ["--model", "x"], asked()) is None


def test_the_processes_that_were_started_start_no_others(monkeypatch):
    monkeypatch.setenv(STARTED, "1")
    monkeypatch.setattr("subprocess.Popen", None)
    assert launch("train", [], asked(num_processes=2)) is None


def test_the_launcher_gets_the_command_line_as_it_was(monkeypatch):
    called = []

    class Remembers:
        def __init__(self, words, env, start_new_session):
            called.append((words, env))

        def wait(self):
            return 7

    monkeypatch.setattr("subprocess.Popen", Remembers)
    argv = ["--model", "x", "--accelerate_config", "fsdp2", "--num_processes", "4"]
    assert launch("train", argv, asked(accelerate_config="fsdp2", num_processes=4)) == 7
    words, environment = called[0]
    assert words[1:3] == ["-m", "accelerate.commands.launch"]
    assert words[-len(argv) - 3 :] == ["-m", "fastdpo", "train", *argv]
    assert words[words.index("--config_file") + 1] == str(CONFIGS["fsdp2"])
    assert "--num_processes=4" in words
    assert environment[STARTED] == "1"


def test_processes_alone_are_copies_of_the_model(monkeypatch):
    assert launcher_words(asked(num_processes=3)) == [
        "--config_file",
        str(CONFIGS["multi_gpu"]),
        "--num_processes=3",
    ]
    assert "--config_file" not in launcher_words(asked(num_processes=1))  # accelerate wants two for that


def test_without_a_number_every_gpu_gets_a_process(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert launcher_words(asked(accelerate_config="zero3"))[-1] == "--num_processes=4"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(ValueError, match=r"num_processes must be given .*--num_processes N"):
        launcher_words(asked(accelerate_config="zero3"))


def test_a_file_of_ones_own_says_itself_how_many(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(CONFIGS["multi_gpu"].read_text())
    machines = asked(accelerate_config=str(path), num_machines=2, machine_rank=1, main_process_ip="10.0.0.1")
    words = ["--config_file", str(path), "--num_machines=2", "--machine_rank=1", "--main_process_ip=10.0.0.1"]
    assert launcher_words(machines) == words


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--accelerate_config", "fsdp3"), "did you mean 'fsdp2'?"),
        (
            ("--accelerate_config", "no.yaml"),
            "accelerate_config must be one of fsdp2, hybrid, multi_gpu, sp, tp, zero2, zero3, or a file",
        ),
        (("--num_processes", "0"), "num_processes must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_started_is_refused(capsys, tmp_path, monkeypatch, options, message):
    monkeypatch.setattr("subprocess.Popen", None)
    words = ("--model", "a/b", "--dataset", "c/d", "--output_dir", tmp_path / "out")
    code, _, err = run(capsys, "train", *words, *options)
    assert code == 2
    assert message in err


def test_a_package_that_is_missing_is_named_before_anything_starts(monkeypatch):
    monkeypatch.setattr("subprocess.Popen", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="accelerate_config zero3 needs the deepspeed package"):
        launch("train", [], asked(accelerate_config="zero3", num_processes=2))


KINDS = {
    "multi_gpu": "MULTI_GPU",
    "fsdp2": "FSDP",
    "hybrid": "FSDP",
    "zero2": "DEEPSPEED",
    "zero3": "DEEPSPEED",
    "tp": "MULTI_GPU",
    "sp": "FSDP",
}
RECIPES = Path(__file__).parents[2] / "recipes" / "accelerate"


def test_the_names_are_configurations_that_accelerate_reads():
    from accelerate.commands.config.config_args import load_config_from_file

    assert set(CONFIGS) == set(KINDS)
    for name, kind in KINDS.items():
        config = load_config_from_file(str(start.config_file(name)))
        assert config.distributed_type == kind, name
        assert config.mixed_precision == "no"  # the run's own bf16 and fp16 decide
        if kind == "FSDP":
            assert config.fsdp_config["fsdp_version"] == 2
    stages = [
        yaml.safe_load(CONFIGS[name].read_text())["deepspeed_config"]["zero_stage"] for name in ("zero2", "zero3")
    ]
    assert stages == [2, 3]


def launchers_arguments(words):
    """What accelerate's launcher makes of its options."""
    from accelerate.commands import launch as accelerates

    parser = accelerates.launch_command_parser()
    arguments, _, _ = accelerates._validate_launch_command(parser.parse_args([*words, "script.py"]))
    return arguments


@pytest.mark.parametrize("name", KINDS)
def test_eight_gpus_of_a_machine_and_of_two_have_a_recipe(name, monkeypatch):
    from accelerate.commands.config.config_args import load_config_from_file

    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    named = yaml.safe_load(CONFIGS[name].read_text())
    for num_machines in (1, 2):
        path = RECIPES / f"{name}_{num_machines}x8.yaml"
        config = load_config_from_file(str(path))
        assert (config.num_machines, config.num_processes) == (num_machines, 8 * num_machines)
        arguments = launchers_arguments(["--config_file", str(path)])
        assert arguments.num_processes == 8 * num_machines
        written = yaml.safe_load(path.read_text())
        for key in ("distributed_type", "deepspeed_config", "mixed_precision"):
            assert written.get(key) == named.get(key), (path.name, key)
        assert f"accelerate launch --config_file recipes/accelerate/{path.name}" in path.read_text()
        if name == "hybrid":
            sizes = (arguments.parallelism_config_dp_replicate_size, arguments.parallelism_config_dp_shard_size)
            assert sizes == (2, 4 * num_machines)
    assert {path.name for path in RECIPES.glob("*.yaml")} == {f"{kind}_{m}x8.yaml" for kind in KINDS for m in (1, 2)}


@pytest.mark.parametrize(
    ("options", "sizes"),
    [({"num_processes": 8}, (2, 4)), ({"num_processes": 32, "num_machines": 4}, (4, 8))],
)
def test_hybrid_keeps_a_copy_on_every_machine_or_two_on_one(options, sizes):
    arguments = launchers_arguments(launcher_words(asked(accelerate_config="hybrid", **options)))
    assert (arguments.parallelism_config_dp_replicate_size, arguments.parallelism_config_dp_shard_size) == sizes
    assert arguments.use_parallelism_config


def test_hybrid_needs_processes_for_every_copy():
    for num_processes in (2, 3):
        with pytest.raises(ValueError, match="num_processes must be a multiple of 2, and more, for accelerate_config"):
            launcher_words(asked(accelerate_config="hybrid", num_processes=num_processes))


@pytest.mark.parametrize(("name", "setting"), [("tp", "tensor_parallel_size"), ("sp", "sequence_parallel_size")])
def test_the_processes_of_a_machine_are_one_group(name, setting):
    given = {"accelerate_config": name, "num_processes": 16, "num_machines": 2}
    assert group_words(asked(**given)) == [f"--{setting}=8"]
    assert group_words(argparse.Namespace(**{**vars(asked(**given)), setting: 4})) == []  # already on the command line
    assert group_words(asked(accelerate_config="fsdp2", num_processes=8)) == []


def test_every_machine_has_as_many_gpus_as_this_one(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    assert "--num_processes=16" in launcher_words(asked(accelerate_config="fsdp2", num_machines=2))


@pytest.mark.parametrize(
    ("environment", "world_size", "refused"),
    [
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "0"}, 1, True),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "0"}, 2, False),
        ({"WORLD_SIZE": "2"}, 1, False),  # of a cluster's job, in which no launcher started this process
        ({}, 1, False),
    ],
)
def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch, environment, world_size, refused):
    """As without a GPU: each would train on all data and write to the same folder."""
    for name in ("WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    args = SimpleNamespace(world_size=world_size, use_cpu=False)
    with pytest.raises(ValueError, match="use_cpu must be true for 2 processes") if refused else nullcontext():
        check_processes(args)
