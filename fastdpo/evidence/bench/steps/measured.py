"""One method's turns on a workload, and the record that they make.

In: figures of the process that ran a job. Out: a record with pairs per second (median, minimum and maximum of the
turns), peak memory and the share of the matmul rate. A method whose losses differ from those of the first one, or whose
first one is not ln 2, has the reason in the place of its speed.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch

from fastdpo.evidence.bench.measure import elapsed_ms, matmul_job
from fastdpo.evidence.bench.steps.methods import METHODS, Job
from fastdpo.evidence.bench.steps.worker import Worker
from fastdpo.evidence.bench.steps.workloads import Work, Workload, make_rows, make_tokenizer, source_of

SIDE = {"cpu": 2048, "cuda": 8192}  # of the square matmul that MFU is measured against


def on_gpu() -> bool:
    return torch.cuda.is_available()


def matmul_tflops(dtype: str) -> float:
    """The best of five: the rate that the machine can reach."""
    function, flops = matmul_job((SIDE["cuda" if on_gpu() else "cpu"],) * 3, getattr(torch, dtype))
    function()
    return flops / min(elapsed_ms(function) for _ in range(5)) / 1e9


def num_tokens_per_step(workload: Workload, num_rows: int) -> float:
    """Tokens of prompts and responses as TRL counts them, the prompt once per response, padding left out."""
    tokenizer = make_tokenizer(workload)
    rows = make_rows(workload, num_rows)
    texts = [row["prompt"] + row[side] + tokenizer.eos_token for row in rows for side in ("chosen", "rejected")]
    lengths = [min(len(ids), workload.max_length) for ids in tokenizer(texts, verbose=False)["input_ids"]]
    return sum(lengths) / num_rows * workload.pairs_per_step


class Measurement:
    """One method's turns so far, and the record that they make."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.turns: list[dict[str, Any]] = []
        self.error: str | None = None

    def add(self, figures: dict[str, Any], expected: list[float] | None) -> None:
        workload = self.job.work
        if "error" in figures:
            self.error = figures["error"]
            return
        self.turns.append(figures)
        losses = figures["losses"]
        expected = expected or [math.log(2), *losses[1:]]
        offs = [abs(a - b) for a, b in zip(losses, expected, strict=True)]
        off = self.turns[-1]["loss_off"] = max(offs)
        if not all(off <= workload.tolerance(b) for off, b in zip(offs, expected, strict=True)):
            self.error = f"losses {_shown(losses)} where {_shown(expected)} is expected, off by {off:.1e}"

    def record(self, tokens_per_step: float, tflops: float) -> dict[str, Any]:
        workload, method = self.job.work, METHODS[self.job.method]
        record: dict[str, Any] = {
            "workload": workload.name,
            "method": method.name,
            "off": method.off,
            "dtype": workload.dtype,
            "model": {k: v for k, v in asdict(workload).items() if k.endswith("size") or k.startswith("num_")},
            "data": source_of(workload),
            "pairs_per_step": workload.pairs_per_step,
            "tokens_per_step": round(tokens_per_step),
            "rounds": len(self.turns),
            "steps": self.job.num_steps,
            "matmul_tflops": tflops,
        }
        if self.turns:
            last = self.turns[-1]
            names = ("micro_batch", "attention", "losses", "loss_off")
            record |= {name: last[name] for name in names}
        if self.error is not None:
            return {**record, "error": self.error}
        seconds = [sum(turn["step_s"]) / len(turn["step_s"]) for turn in self.turns]
        rates = sorted(workload.pairs_per_step / s for s in seconds)
        rate = statistics.median(rates)
        flops = Work(**last["work"]).flops(workload, last["num_backbone_weights"]) / self.job.num_steps
        return {
            **record,
            "pairs_per_s": rate,
            "pairs_per_s_min": rates[0],
            "pairs_per_s_max": rates[-1],
            "tokens_per_s": rate / workload.pairs_per_step * tokens_per_step,
            "flops_per_step": flops,
            "mfu": flops * rate / workload.pairs_per_step / (tflops * 1e12),
            "peak_mib": max(turn["peak_mib"] for turn in self.turns),
            "collator_share": statistics.median(turn["collate_s"] / sum(turn["step_s"]) for turn in self.turns),
            "data_share": statistics.median(turn["data_s"] / sum(turn["step_s"]) for turn in self.turns),
        }


def _shown(losses: list[float]) -> str:
    return " ".join(f"{loss:.6f}" for loss in losses)


def measure(
    jobs: Mapping[str, Job],
    worker: Worker,
    num_rounds: int,
    each: Callable[[dict[str, Any]], None],
    expected: list[float] | None = None,
    deadline: float = math.inf,
) -> dict[str, dict[str, Any]]:
    """Records of the jobs, which are methods on one workload, by name; each method has one turn a round.

    Args:
        each: called with every finished record, at once where a method fails.
        expected: losses of an earlier method; by default those of the first method that has some.
        deadline: value of `time.monotonic()` after which no turn starts.
    """
    if not jobs:
        return {}
    some = next(iter(jobs.values()))
    tokens = num_tokens_per_step(some.work, some.num_rows)
    measurements = {name: Measurement(job) for name, job in jobs.items()}
    rates: list[float] = []
    records: dict[str, dict[str, Any]] = {}
    finished: set[str] = set()
    for number in range(num_rounds):
        rates.append(matmul_tflops(some.work.dtype))
        for name, measurement in measurements.items():
            if measurement.error is not None or time.monotonic() > deadline:
                continue
            figures = worker.run(measurement.job, in_new_process=not on_gpu())
            measurement.add(figures, expected)
            if expected is None and measurement.error is None:
                expected = figures["losses"]
            records[name] = measurement.record(tokens, max(rates))
            if number == num_rounds - 1 or measurement.error is not None:
                each(records[name])
                finished.add(name)
    for name, record in records.items():
        if name not in finished:
            each(record)
    return records
