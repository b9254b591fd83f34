"""`--accelerate_config` and `--num_processes`: runs the command again on several processes with accelerate's launcher.

In: the options for the number of processes and the configuration; named configurations are files in this folder.
Out: the exit code of the launcher, or None if this process should do the run itself. Refuses unknown names.
"""

from __future__ import annotations

import argparse
import difflib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import util
from pathlib import Path
from types import FrameType
from typing import Any

from fastdpo.children import child_environment

CONFIGS = {file.stem: file for file in sorted(Path(__file__).parent.glob("*.yaml"))}
STARTED = "FASTDPO_IS_LAUNCHED"  # set in the processes that the launcher starts: they run and start no others
_PASSED_ON = ("num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port")
_GROUPS = {"tp": "tensor_parallel_size", "sp": "sequence_parallel_size"}  # processes of a machine work as one group


def launch(command: str, argv: Sequence[str], options: argparse.Namespace) -> int | None:
    """Runs `fastdpo <command> <argv>` under accelerate if `options` ask for it.

    Raises:
        ValueError: an unknown configuration, or an invalid number of processes.
    """
    asked = [name for name in ("accelerate_config", *_PASSED_ON) if getattr(options, name) is not None]
    if not asked or STARTED in os.environ:
        return None
    if str(options.accelerate_config).startswith("zero") and util.find_spec("deepspeed") is None:
        raise ValueError(
            f"accelerate_config {options.accelerate_config} needs the deepspeed package, which is not installed:"
            " pip install 'fastdpo[deepspeed]'"
        )
    words = launcher_words(options)
    words = [sys.executable, "-m", "accelerate.commands.launch", *words, "-m", "fastdpo", command, *argv]
    words += group_words(options)
    return run_signalled(words, child_environment(**{STARTED: "1"}))


def check_processes(args: Any) -> None:
    """Refuses processes of a launcher that do not know of each other, each of which would train by itself.

    Args:
        args: TrainingArguments.
    Raises:
        ValueError: there are several, as on a machine without GPUs if nothing says that the CPU is meant.
    """
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if "LOCAL_RANK" in os.environ and asked > 1 and args.world_size == 1:
        raise ValueError(
            f"use_cpu must be true for {asked} processes on a machine without GPUs, got {args.use_cpu}: add --use_cpu"
            " true, or run one process"
        )


def run_signalled(words: Sequence[str], environment: Mapping[str, str]) -> int:
    """Runs a launcher and hands signals on to its processes. Returns its exit code, or 128 + the signal's number.

    The launcher gets a session of its own, so that Ctrl-C reaches its processes once, through this process. They get
    SIGTERM, whatever came. The launcher itself gets none: torchrun hands it on, but kills what has not saved within 30
    seconds. It ends when its processes have. A second signal kills all of them.
    """
    received: list[int] = []
    process = subprocess.Popen(words, env=environment, start_new_session=True)

    def hand_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) == 1:
            _terminate_children(process.pid)
        else:
            _kill(process.pid)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 + received[0] if received else code


def _terminate_children(pid: int) -> None:
    """Sends SIGTERM to the processes that a launcher has started; to itself if it has not started any yet."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        launcher = psutil.Process(pid)
        for each in launcher.children() or [launcher]:
            with suppress(psutil.NoSuchProcess):
                each.terminate()


def _kill(pid: int) -> None:
    """Ends a process and all that it has started, which have sessions of their own."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        launcher = psutil.Process(pid)
        for each in (*launcher.children(recursive=True), launcher):
            with suppress(psutil.NoSuchProcess):
                each.kill()


def launcher_words(options: argparse.Namespace) -> list[str]:
    """The options for accelerate's launcher."""
    for name in ("num_processes", "num_machines"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    name = options.accelerate_config or "multi_gpu"
    given = {key: getattr(options, key) for key in _PASSED_ON if getattr(options, key) is not None}
    if name in CONFIGS:
        given["num_processes"] = _num_processes(options)
    if name in ("multi_gpu", "tp") and given["num_processes"] == 1:  # the launcher wants two of that kind at least
        return ["--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    if name == "hybrid":
        given |= _copies(options)
    return ["--config_file", str(config_file(name)), *(f"--{key}={value}" for key, value in given.items())]


def group_words(options: argparse.Namespace) -> list[str]:
    """The setting that makes the processes of each machine one group, if the configuration asks for it and no size is
    given."""
    setting = _GROUPS.get(options.accelerate_config or "")
    if setting is None or (getattr(options, setting, None) or 1) > 1:
        return []
    return [f"--{setting}={_num_processes(options) // (options.num_machines or 1)}"]


def _copies(options: argparse.Namespace) -> dict[str, int]:
    """How many copies of the model there are, and over how many processes each is divided: a copy on every machine, or
    two on a single one.

    Raises:
        ValueError: the processes cannot be dealt to the copies.
    """
    num_processes, num_copies = _num_processes(options), max(options.num_machines or 1, 2)
    if num_processes % num_copies or num_processes == num_copies:
        raise ValueError(
            f"num_processes must be a multiple of {num_copies}, and more, for accelerate_config hybrid, which divides"
            f" {num_copies} copies of the model over processes, got {num_processes}"
        )
    prefix = "parallelism_config_dp"
    return {f"{prefix}_replicate_size": num_copies, f"{prefix}_shard_size": num_processes // num_copies}


def config_file(name: str) -> Path:
    """Raises:
    ValueError: the name is neither in CONFIGS nor a file.
    """
    if name in CONFIGS:
        return CONFIGS[name]
    if not Path(name).is_file():
        nearest = difflib.get_close_matches(name, CONFIGS, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(
            f"accelerate_config must be one of {', '.join(CONFIGS)}, or a file of `accelerate config`, got"
            f" {name!r}{hint}"
        )
    return Path(name)


def _num_processes(options: argparse.Namespace) -> int:
    """Of all machines: as asked, or one for every GPU, with as many on the other machines as here.

    Raises:
        ValueError: none is asked for, and there is no GPU.
    """
    if options.num_processes is not None:
        return int(options.num_processes)
    import torch  # only here: a run on several GPUs waits for it anyway

    if torch.cuda.device_count() == 0:
        raise ValueError("num_processes must be given on a machine without a GPU: --num_processes N")
    return torch.cuda.device_count() * int(options.num_machines or 1)
