"""What `fastdpo.integrations.trl.accelerate(trainer)` is worth: TRL's own training step before and after.

    python benchmarks/bench_trl_seat.py [--quick] [--workloads ...] [--methods ...] [--steps N] [--rounds N]
                                        [--out FILE.jsonl]

Workloads and TRL's settings are those of bench_training_step.py; nothing but the head op changes. Every turn is a
process of its own, before and after take turns, and their first losses must agree to the workload's tolerance. Time is
seconds per step, the reference's forward included; memory is the process's peak (resident on a CPU, allocated on a
GPU), with weights, gradients and optimizer state, which are the same in both.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fastdpo.evidence.bench.measure import append_lines, machine_facts
from fastdpo.evidence.bench.steps.methods import METHODS, Job
from fastdpo.evidence.bench.steps.worker import QUIET, answer
from fastdpo.evidence.bench.steps.workloads import CPU_WORKLOADS, GPU_WORKLOADS, WORKLOADS

BEFORE, AFTER = "before", "after"
TRL_METHODS = [name for name, method in METHODS.items() if method.kind == "trl"]


def turn(line: str) -> dict[str, Any]:
    """Figures of one job, in this process. `line` is JSON: the job, and whether the trainer is accelerated."""
    request = json.loads(line)
    if request["which"] == AFTER:
        import trl

        from fastdpo.integrations.trl import accelerate

        class AcceleratedTrainer(trl.DPOTrainer):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                accelerate(self)

        trl.DPOTrainer = AcceleratedTrainer  # what the benchmark of the training step will build
    return answer(json.dumps(request["job"]))


def in_new_process(job: Job, which: str, folder: str) -> dict[str, Any]:
    """As `turn`, or {"error": ...}."""
    request = json.dumps({"job": asdict(job), "which": which})
    command = [sys.executable, str(Path(__file__)), "--turn", request]
    env = {**os.environ, **QUIET, "HF_DATASETS_CACHE": folder}
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    lines = result.stdout.strip().splitlines()
    if result.returncode != 0 or not lines:
        return {"error": f"exit code {result.returncode}: {' '.join(result.stderr.strip().splitlines()[-1:])}"}
    return json.loads(lines[-1])


def measure(job: Job, num_rounds: int, folder: str) -> dict[str, Any]:
    """The record of one workload and method: seconds of a step and peak MiB, before and after."""
    turns: dict[str, list[dict[str, Any]]] = {BEFORE: [], AFTER: []}
    record: dict[str, Any] = {"workload": job.workload, "method": job.method, "steps": job.num_steps}
    for _ in range(num_rounds):
        for which, taken in turns.items():
            figures = in_new_process(job, which, folder)
            if "error" in figures:
                return {**record, "error": f"{which}: {figures['error']}"}
            taken.append(figures)
    losses = {which: taken[0]["losses"] for which, taken in turns.items()}
    offs = [(abs(a - b), WORKLOADS[job.workload].tolerance(a)) for a, b in zip(*losses.values(), strict=True)]
    off = max(offs)[0]
    record |= {"rounds": num_rounds, "losses": losses, "loss_off": off}
    if not all(off <= most for off, most in offs):
        return {**record, "error": f"losses differ by {off:.1e}"}
    for which, taken in turns.items():
        seconds = [sum(figures["step_s"]) / len(figures["step_s"]) for figures in taken]
        record[which] = {
            "step_s": statistics.median(seconds),
            "step_s_min": min(seconds),
            "step_s_max": max(seconds),
            "peak_mib": max(figures["peak_mib"] for figures in taken),
        }
    return record


def text(record: dict[str, Any]) -> str:
    """The record as rows of a table."""
    title = f"| {record['workload']} | {record['method']} |"
    if "error" in record:
        return f"{title} {record['error']} | | | |"
    rows = []
    for which, name in ((BEFORE, "as TRL has it"), (AFTER, "accelerated")):
        figures, base = record[which], record[BEFORE]
        ratios = f"{figures['step_s'] / base['step_s']:.2f} | {figures['peak_mib']:.0f}"
        spread = f"{figures['step_s']:.2f} ({figures['step_s_min']:.2f} to {figures['step_s_max']:.2f})"
        rows.append(f"{title} {name} | {spread} | {ratios} | {record['loss_off']:.0e} |")
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), metavar="NAME")
    parser.add_argument("--methods", nargs="+", choices=TRL_METHODS, metavar="NAME")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a turn")
    parser.add_argument("--rounds", type=int, default=3, help="turns before and after")
    parser.add_argument("--out", help="append one JSON line per workload and method to this file")
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round")
    parser.add_argument("--turn", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.turn is not None:
        print(json.dumps(turn(options.turn)))
        return
    here = "gpu" if on_gpu else "cpu"
    workloads = options.workloads or (["tiny"] if options.quick else GPU_WORKLOADS if on_gpu else CPU_WORKLOADS)
    methods = options.methods or [name for name in TRL_METHODS if here in METHODS[name].on]
    facts = machine_facts()
    print(" ".join(f"{key}={value}" for key, value in facts.items()))
    print("\n| workload | method | head | s per step | x | peak MiB | losses off |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="fastdpo-bench-") as folder:
        for workload in workloads:
            for method in methods:
                job = Job(workload, method, num_warmups=2 if on_gpu else 1, num_steps=options.steps)
                record = measure(job, 1 if options.quick else options.rounds, folder)
                print(text(record), flush=True)
                append_lines(options.out, [{**facts, **record}])


if __name__ == "__main__":
    main()
