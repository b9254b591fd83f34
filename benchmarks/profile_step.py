"""A profiler trace of ten training steps, with what the host did in them: waits for the device, copies and launches.

    python benchmarks/profile_step.py [--out TRACE.json.gz] [--record FILE.jsonl] [--quick]

In: the model and rows of the step benchmark. Out: Chrome's trace (chrome://tracing, ui.perfetto.dev) and one JSON line
of counts per step. On a CPU there are no launches, and the counts say so.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from fastdpo.evidence.bench.measure import append_lines, machine_facts
from fastdpo.evidence.bench.steps.methods import METHODS, Job, _dataset, _settings
from fastdpo.evidence.bench.steps.workloads import GPU_WORKLOADS, WORKLOADS, make_tokenizer

NUM_WARMUPS, NUM_STEPS = 4, 10
# The CUDA calls behind each count: what stops the host, what it queues
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
COPIES = ("cudaMemcpyAsync",)


def counts_of(names: Counter[str], num_steps: int) -> dict[str, float]:
    """Calls per step by kind, from how often each name was seen."""
    kinds = {"waits": WAITS, "launches": LAUNCHES, "copies": COPIES}
    return {kind: sum(names[name] for name in calls) / num_steps for kind, calls in kinds.items()}


def run(workload_name: str, trace: str | None) -> dict[str, Any]:
    """Trains NUM_WARMUPS + NUM_STEPS steps, the latter under the profiler."""
    from transformers import TrainerCallback

    from fastdpo import DPOConfig, DPOTrainer

    workload, device = WORKLOADS[workload_name], torch.device("cuda" if torch.cuda.is_available() else "cpu")
    job, method = Job(workload_name, "fastdpo", NUM_WARMUPS, NUM_STEPS), METHODS["fastdpo"]
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    profiler = profile(activities=activities, acc_events=True)
    seconds: list[float] = []

    class Profiled(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == NUM_WARMUPS:
                _settle(device)
                profiler.start()
                seconds.append(_now())
            elif state.global_step == NUM_WARMUPS + NUM_STEPS:
                _settle(device)
                seconds.append(_now())
                profiler.stop()

    with tempfile.TemporaryDirectory() as folder:
        settings = _settings(job, workload, _whole_step(method, workload), device, folder)
        args = DPOConfig(**{**settings, "logging_steps": 10**6}, reference="frozen", ref_cache_dir=folder)
        trainer = DPOTrainer(
            workload.make_model(str(device), "sdpa"),
            args=args,
            train_dataset=_dataset(job, workload),
            processing_class=make_tokenizer(workload),
            callbacks=[Profiled()],
        )
        trainer.train()
    names = Counter(event.name for event in profiler.events())
    if trace is not None:
        profiler.export_chrome_trace(trace)
    step_ms = 1000 * (seconds[1] - seconds[0]) / NUM_STEPS
    return {"workload": workload_name, "steps": NUM_STEPS, "step_ms": step_ms, **counts_of(names, NUM_STEPS)}


def _whole_step(method: Any, workload: Any) -> Any:
    from dataclasses import replace

    return replace(method, micro_batch=workload.pairs_per_step)


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _now() -> float:
    import time

    return time.perf_counter()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="file of the trace, .json or .json.gz")
    parser.add_argument("--record", help="append the counts to this file as a JSON line")
    parser.add_argument("--quick", action="store_true", help="a tiny model")
    options = parser.parse_args(argv)
    options.workload = "tiny" if options.quick or not torch.cuda.is_available() else GPU_WORKLOADS[0]
    return options


def main(argv: list[str] | None = None) -> None:
    options = parse_args(argv)
    record = {**machine_facts(), **run(options.workload, options.out)}
    append_lines(options.record, [record])
    print(
        f"{record['workload']}: {record['step_ms']:.1f} ms a step, {record['waits']:.1f} host waits,"
        f" {record['launches']:.0f} launches, {record['copies']:.1f} copies"
    )


if __name__ == "__main__":
    main()
