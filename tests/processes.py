"""Functions of test modules on several processes at once, which are forked from one that has imported everything.

Imports take most of what a process costs: the process that forks, `_Forks`, starts once per test run, and a run of
many cases on two processes then costs what its cases cost. In: a function of a module, its cases. Out: what it returned
on every process. It fails, with the end of what was printed, as soon as one process fails, and after `timeout` seconds.
`status_of` runs a function that may be killed: on one process, whose exit status it returns.

As a script: the process that forks; or, for processes that share a GPU, what torchrun starts.
"""

import atexit
import gc
import importlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy

ONE_CARD = "FASTDPO_TESTS_ON_ONE_CARD"  # of the environment: every process has the first GPU
TIMEOUT = 900  # seconds, for a busy machine
ON_ONE_THREAD = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
ENDED, LATE = "ended with the one that failed", "did not end"


def on_processes(function, cases, folder, num_processes=2, *, on_one_card=False, timeout=TIMEOUT):
    """What `function(folder of the case, **case)` has returned, a list over cases of lists over processes.

    The cases are one list, run in order, each in a folder of its own that all processes share. Cases and results go
    through JSON. Processes are on the CPU, or with `on_one_card` all on the first GPU.
    """
    (folder / "cases.json").write_text(json.dumps(cases))
    words = [str(folder), function.__code__.co_filename, function.__name__]
    if on_one_card:
        _on_one_card(words, num_processes, timeout)
    else:
        statuses = _forks.run(words, num_processes, timeout)
        failed = [rank for rank, status in enumerate(statuses) if status not in (0, ENDED)]
        printed = [Path(folder, f"printed{rank}.txt").read_text()[-3000:] for rank in failed]
        assert not failed, "\n".join([f"processes {failed} of {num_processes} failed or did not end:", *printed])
    of_process = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(num_processes)]
    return [list(results) for results in zip(*of_process, strict=True)]


def status_of(function, folder, case):
    """The exit status of `function(**case)` in a process of its own: -9 if SIGKILL has ended it.

    What it printed is in printed0.txt of the folder, which is made. The case goes through JSON.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    words = [str(folder), function.__code__.co_filename, function.__name__, json.dumps(case)]
    (status,) = _forks.run(words, None, math.inf)
    return status


def _on_one_card(words, num_processes, timeout):
    """With an interpreter each: a process that knows of a GPU cannot be forked."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    done = subprocess.run(
        [*start, __file__, *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "0", ONE_CARD: "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-3000:]


class _Forks:
    """The process that forks, from its first use to the end of the tests."""

    def __init__(self):
        self.process = None

    def run(self, words, num_processes, timeout):
        """The exit statuses of the processes: a number, ENDED or LATE.

        Args:
            num_processes: of a group. None: one process, which is no group.
        """
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, **ON_ONE_THREAD},
            )
            atexit.register(self.end)
        order = {"words": words, "num_processes": num_processes, "timeout": timeout, "environment": dict(os.environ)}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def end(self):
        self.process.stdin.close()
        self.process.wait()


_forks = _Forks()


# In the process that forks


def _prepare_to_fork():
    """What every child would do anew: imports, what transformers makes for its first save, a search for garbage among a
    million imported objects, which accelerate asks for at every start of training."""
    import torch

    torch.set_num_threads(1)
    import peft  # noqa: F401
    import tiny_runs  # noqa: F401
    from tiny import make_llama

    from fastdpo import DPOTrainer, SFTTrainer  # noqa: F401

    with tempfile.TemporaryDirectory() as folder:
        make_llama().save_pretrained(folder)
    gc.collect()
    gc.freeze()


def _serve():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print while they are imported is no answer
    import pytest  # noqa: F401
    import torch.distributed.fsdp
    import torch.distributed.tensor  # noqa: F401

    _prepare_to_fork()
    for line in sys.stdin:
        order = json.loads(line)
        statuses = _wait(_fork_all(order), order["timeout"])
        print(json.dumps(statuses), file=answers, flush=True)


def _fork_all(order):
    """Process ids in the order of ranks."""
    num_processes, environment = order["num_processes"], {**order["environment"], **ON_ONE_THREAD}
    if num_processes is None:
        return [_fork(0, environment, order["words"])]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(num_processes)}
    environment["LOCAL_WORLD_SIZE"] = str(num_processes)
    own = ({"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_processes))
    return [_fork(rank, {**environment, **of_rank}, order["words"]) for rank, of_rank in enumerate(own)]


def _fork(rank, environment, words):
    """The id of a process like one that was started: with its own streams, environment and random numbers."""
    pid = os.fork()
    if pid != 0:
        return pid
    code = 1
    try:
        os.setpgid(0, 0)
        with open(Path(words[0], f"printed{rank}.txt"), "w") as printed, open(os.devnull) as nothing:
            os.dup2(nothing.fileno(), 0)
            os.dup2(printed.fileno(), 1)
            os.dup2(printed.fileno(), 2)
        os.environ.clear()
        os.environ.update(environment)
        numpy.random.seed()  # noqa: NPY002, else the same on every process
        _run(*words)
        code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads of the process group may still be ending, and would abort an ordinary exit


def _wait(pids, timeout):
    """The exit statuses in the order of ranks. As soon as one process fails, and when the time is over, the processes
    that are left are killed: theirs are then ENDED or LATE."""
    end, left, statuses = time.monotonic() + timeout, dict(enumerate(pids)), [ENDED] * len(pids)
    while left and all(status in (0, ENDED) for status in statuses):
        for rank, pid in list(left.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del left[rank]
                statuses[rank] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                statuses[rank] = LATE
        time.sleep(0.01)
    for pid in left.values():
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return statuses


# In each process


def _run(folder, file, name, case=None):
    import torch

    torch.set_num_threads(1)
    if os.environ.get(ONE_CARD):
        os.environ["LOCAL_RANK"] = "0"
    sys.path.insert(0, str(Path(file).parent))
    function = getattr(importlib.import_module(Path(file).stem), name)
    if case is not None:
        function(**json.loads(case))
        return
    results = []
    for number, case in enumerate(json.loads(Path(folder, "cases.json").read_text())):
        own = Path(folder, str(number))
        own.mkdir(exist_ok=True)
        results.append(function(own, **case))
    Path(folder, f"rank{os.environ['RANK']}.json").write_text(json.dumps(results))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    if not sys.argv[1:]:
        _serve()
    else:
        _run(*sys.argv[1:])
        os._exit(0)  # as in `_fork`
