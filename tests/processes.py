"""Functions of test modules on several processes at once; the processes, seconds of imports, start once for many cases.

As a script, started by torchrun: folder, file of the module, name of the function.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

ONE_CARD = "FASTDPO_TESTS_ON_ONE_CARD"  # of the environment: every process has the first GPU


def on_processes(function, cases, folder, num_processes=2, *, on_one_card=False):
    """What `function(folder of the case, **case)` has returned, a list over cases of lists over processes.

    The cases are one list, run in order, each in a folder of its own that all processes share. Cases and results go
    through JSON. Processes are on the CPU, or with `on_one_card` all on the first GPU.
    """
    (folder / "cases.json").write_text(json.dumps(cases))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    done = subprocess.run(
        [*start, __file__, str(folder), function.__code__.co_filename, function.__name__],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "0" if on_one_card else "",
            ONE_CARD: "1" if on_one_card else "",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    of_process = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(num_processes)]
    return [list(results) for results in zip(*of_process, strict=True)]


def _run(folder, file, name):
    torch.set_num_threads(1)
    if os.environ.get(ONE_CARD):
        os.environ["LOCAL_RANK"] = "0"
    sys.path.insert(0, str(Path(file).parent))
    function = getattr(importlib.import_module(Path(file).stem), name)
    results = []
    for number, case in enumerate(json.loads(Path(folder, "cases.json").read_text())):
        own = Path(folder, str(number))
        own.mkdir(exist_ok=True)
        results.append(function(own, **case))
    Path(folder, f"rank{os.environ['RANK']}.json").write_text(json.dumps(results))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    os._exit(0)  # threads of the process group may still be ending, and would abort an ordinary exit


if __name__ == "__main__":
    _run(*sys.argv[1:])
