"""A whole training step against TRL's DPOTrainer and plain padded PyTorch loops, and what each feature is worth.

    python benchmarks/bench_training_step.py [--quick] [--workloads ...] [--methods ...] [--steps N] [--rounds N]
                                             [--max-seconds S] [--out FILE.jsonl [--resume]] [--data FILE.json]

Model, rows, order, dtype and optimizer are the same for everybody (steps/methods.py). Methods take turns in rounds; on
a CPU every turn is a process of its own, whose peak resident memory is reported. Losses of the first steps are compared
with those of the first method in the run that has some, whose own first one must be ln 2: a method that is off by more
than the tolerance (1e-4 in fp32, see Workload.tolerance) gets no speed but the reason. "7B QLoRA" asks whether a step
fits in 24 GB (steps/qlora.py). With --resume, what FILE has a line of is not measured again; the exit code is 3 where
something was left out for lack of time. --data says where the instruction file of the CPU workloads is
(steps/workloads.py).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from fastdpo.evidence.bench.measure import append_lines, machine_facts
from fastdpo.evidence.bench.steps.measured import measure, on_gpu
from fastdpo.evidence.bench.steps.methods import METHODS, NUM_CHECKED, Job
from fastdpo.evidence.bench.steps.tables import qlora_text, training_table
from fastdpo.evidence.bench.steps.worker import Worker
from fastdpo.evidence.bench.steps.workloads import (
    CPU_WORKLOADS,
    DATA_VARIABLE,
    GPU_WORKLOADS,
    WORKLOADS,
    Workload,
    data_file,
)

UNFINISHED = 3  # exit code


def run_workload(
    workload: Workload,
    options: argparse.Namespace,
    facts: dict[str, Any],
    worker: Worker,
    deadline: float,
    known: dict[str, dict[str, Any]],
) -> list[str]:
    """Measures the methods that are not known yet, and prints all of them; returns those that there was no time for."""
    names = [name for name in options.methods if ("gpu" if on_gpu() else "cpu") in METHODS[name].on]
    if not names:
        print(f"\n{workload.name}: none of the methods runs on this device")
        return []
    jobs = {name: Job(workload.name, name, options.warmups, options.steps) for name in names}
    expected: list[float] | None = next((r["losses"] for r in known.values() if "pairs_per_s" in r), None)
    records = measure(
        {name: job for name, job in jobs.items() if name not in known},
        worker,
        options.rounds,
        lambda record: append_lines(options.out, [{**facts, **record}]),
        expected,
        deadline,
    )
    records = {name: {**facts, **record} for name, record in records.items()}
    records = {name: {**known, **records}[name] for name in names if name in known or name in records}
    print("\n" + training_table(list(records.values())))
    left_out = [name for name in names if name not in records]
    if left_out:
        print(f"left out: {', '.join(left_out)} (out of time)")
    return left_out


def known_records(options: argparse.Namespace) -> dict[tuple[str, str], dict[str, Any]]:
    """What an earlier run has written, by workload and method."""
    if not options.resume or not Path(options.out).exists():
        return {}
    records = map(json.loads, Path(options.out).read_text().splitlines())
    return {(record["workload"], record["method"]): record for record in records}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=[*WORKLOADS, "7B QLoRA"], metavar="NAME")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="NAME")
    parser.add_argument("--steps", type=int, help="timed steps of a turn (default: 4, GPU: 5, quick: 3)")
    parser.add_argument("--warmups", type=int, help="steps before them (default: 1, GPU: 2)")
    parser.add_argument("--rounds", type=int, help="turns of each method (default: 3, GPU and quick: 1)")
    parser.add_argument("--max-seconds", type=float, default=float("inf"), help="start no turn later than this")
    parser.add_argument("--out", help="append one JSON line per method and workload to this file")
    parser.add_argument("--resume", action="store_true", help="leave out what the file of --out has a line of")
    parser.add_argument("--data", help=f"the instruction file (default: {DATA_VARIABLE}, or {data_file()})")
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round of three steps")
    options = parser.parse_args(argv)
    default = ["tiny"] if options.quick else [*GPU_WORKLOADS, "7B QLoRA"] if on_gpu() else CPU_WORKLOADS
    options.workloads = options.workloads or default
    options.steps = options.steps or (3 if options.quick else 5 if on_gpu() else 4)
    options.warmups = (2 if on_gpu() else 1) if options.warmups is None else options.warmups
    options.rounds = options.rounds or (1 if options.quick or on_gpu() else 3)
    if options.data is not None:
        if not Path(options.data).expanduser().is_file():
            parser.error(f"--data must be an existing file, got {options.data}")
        os.environ[DATA_VARIABLE] = str(Path(options.data).expanduser().resolve())
    if options.resume and options.out is None:
        parser.error("--resume must go with --out")
    if options.warmups + options.steps < NUM_CHECKED or options.warmups < 1:
        parser.error(f"--warmups must be at least 1, and {NUM_CHECKED} steps with --steps")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse_args(argv)
    options.deadline = time.monotonic() + options.max_seconds
    facts = machine_facts()
    print(" ".join(f"{key}={value}" for key, value in facts.items()))
    replaced = [name for name in options.workloads if name in CPU_WORKLOADS and not data_file().exists()]
    if replaced:
        print(f"no {data_file()} (--data): {', '.join(replaced)} on synthetic reviews, which gives other figures")
    known = known_records(options)
    worker, left_out = Worker(), []
    try:
        for number, name in enumerate(options.workloads):
            of_this = {method: record for (workload, method), record in known.items() if workload == name}
            left = options.deadline - time.monotonic()
            if name == "7B QLoRA":
                worker.close()  # and with it the memory that its allocator keeps
                left_out += run_qlora(options, facts, of_this, left)
            else:  # each workload may take its share of the time that is left
                deadline = time.monotonic() + left / (len(options.workloads) - number)
                left_out += run_workload(WORKLOADS[name], options, facts, worker, deadline, of_this)
    finally:
        worker.close()
    return UNFINISHED if left_out else 0


def run_qlora(
    options: argparse.Namespace, facts: dict[str, Any], known: dict[str, dict[str, Any]], left: float
) -> list[str]:
    from steps import qlora

    name = "7B QLoRA"
    if not known and left <= 0:
        print(f"\nleft out: {name} (out of time)")
        return [name]
    record = known.get("fastdpo") or {**facts, "workload": name, "method": "fastdpo", **qlora.measure()}
    print(f"\n{name}: {qlora_text(record)}")
    append_lines(options.out, [] if known else [record])
    return []


if __name__ == "__main__":
    sys.exit(main())
