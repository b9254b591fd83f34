"""The process that runs jobs of the training-step benchmark, and the driver's end of it.

A line of JSON in (a Job), a line of JSON out: its figures, or the error that ended it. On a CPU the driver takes a new
process for every job, so that the peak of resident memory is the job's own; on a GPU one process does them all, and is
replaced when it dies.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastdpo.children import child_environment

MIB = 2**20
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore",
}


class Worker:
    """The driver's end."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.folder = tempfile.TemporaryDirectory(prefix="fastdpo-bench-")  # tokens, and what the processes print
        self.log = Path(self.folder.name) / "log.txt"

    def run(self, job: Any, *, in_new_process: bool) -> dict[str, Any]:
        """Figures of the job, or {"error": ...}."""
        if in_new_process:
            self.close()
        if self.process is None:
            with self.log.open("w") as log:
                self.process = subprocess.Popen(
                    [sys.executable, "-m", "fastdpo.evidence.bench.steps.worker"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env=child_environment(**QUIET, HF_DATASETS_CACHE=self.folder.name),
                )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(asdict(job)) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if line:
            return json.loads(line)
        code = self.process.wait()
        self.process = None
        last = self.log.read_text().strip().splitlines()[-1:]
        return {"error": f"the process ended with exit code {code}: {' '.join(last)}"}

    def close(self) -> None:
        """Ends the process."""
        if self.process is not None:
            assert self.process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
            self.process.wait()
            self.process = None


def answer(line: str) -> dict[str, Any]:
    import torch

    from fastdpo.evidence.bench.steps.methods import Job, _release, run
    from fastdpo.evidence.bench.steps.workloads import num_linear_weights

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _forget_the_last_job(device)
    job = Job(**json.loads(line))
    try:
        figures = run(job, device)
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}".split("\n")[0]}
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    workload = job.work
    with torch.device("meta"):
        weights = num_linear_weights(workload.make_model("meta").base_model)  # type: ignore[arg-type]
    _release(device)
    return {**figures, "peak_mib": peak / MIB, "num_backbone_weights": weights}


def _forget_the_last_job(device: Any) -> None:
    from accelerate.state import AcceleratorState, GradientState

    from fastdpo.evidence.bench.steps.methods import _release

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    _release(device)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")  # what libraries print must not come between the answers
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(answer(line)), file=answers, flush=True)


if __name__ == "__main__":
    main()
