"""The head op against its peers: time, peak memory, and share of the machine's matmul rate, on preference batches.

    python benchmarks/bench_linear_logps.py [--quick] [--runs N] [--out FILE.jsonl] [--methods ...] [--passes ...]
    pytest benchmarks/bench_linear_logps.py

Passes: "forward" is log-probs without a gradient; "forward+backward" the gradients of hidden states and head for a
given upstream gradient per token; "frozen head" that of the hidden states alone; "dpo loss" a DPO loss whose reference
log-probs are known, with both gradients. All but "plain, all rows" are given the response rows alone, which is more
than some of them do for themselves. Each method is checked against fp64 on hundreds of rows: a wrong one gets its
error in the place of a number.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import asdict
from typing import Any

import pytest
import torch

from fastdpo.evidence.bench.heads.measured import MATMUL, REFERENCE, check, release, run_pass
from fastdpo.evidence.bench.heads.methods import MAKERS, PASSES, TUNED, Method, available, job, needed_bytes
from fastdpo.evidence.bench.heads.problem import (
    CPU_SHAPES,
    GPU_SHAPES,
    RISKY_SHAPES,
    Shape,
    check_problem,
    errors,
    make_problem,
    with_reference,
)
from fastdpo.evidence.bench.measure import append_lines, free_bytes, machine_facts

BRIEFLY = (REFERENCE, "fastdpo", "fastdpo, tuned")  # on RISKY_SHAPES, unless methods or shapes are asked for


def shapes() -> list[Shape]:
    return GPU_SHAPES if torch.cuda.is_available() else CPU_SHAPES


def print_records(records: list[dict[str, Any]]) -> None:
    print(f"{'method':<24}{'ms':>9}{'min':>9}{'max':>9}{'peak MiB':>10}{'TFLOP/s':>9}{'of matmul':>11}{'error':>9}")
    for record in records:
        if "error" in record:
            print(f"{record['method']:<24}no number: {record['error']}")
            continue
        rate = record["flops"] / record["ms"] / 1e9
        times = "".join(f"{record[key]:>9.1f}" for key in ("ms", "ms_min", "ms_max"))
        share = f"{rate:>9.3f}{rate / record['matmul_tflops']:>11.0%}"
        worst = max(record["errors"].values())
        print(f"{record['method']:<24}{times}{record['peak_mib']:>10.1f}{share}{worst:>9.0e}  {record.get('note', '')}")


@pytest.mark.parametrize("method_name", list(MAKERS))
@pytest.mark.parametrize("pass_name", PASSES)
@pytest.mark.parametrize("shape", shapes(), ids=str)
def test_head_op(benchmark, shape: Shape, pass_name: str, method_name: str) -> None:
    methods, missing = available([method_name])
    if missing or pass_name not in methods[0].products:
        pytest.skip(missing.get(method_name, f"{method_name} has no {pass_name}"))
    if needed_bytes(methods[0], shape) > free_bytes():
        pytest.skip(f"needs about {needed_bytes(methods[0], shape) / 2**30:.0f} GiB")
    problem = with_reference(make_problem(shape))
    small = check_problem(shape, problem)
    reference = Method(REFERENCE, {}, MAKERS[REFERENCE]().logps)
    check(methods[0], pass_name, small, errors(small, pass_name, job(reference, pass_name, small)()))
    function = job(methods[0], pass_name, problem)

    def run() -> None:
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=3, warmup_rounds=1)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, help="timed runs of each method (default: 7, quick: 3)")
    parser.add_argument("--out", help="append one JSON line per measurement to this file")
    parser.add_argument("--shapes", type=Shape.parse, nargs="+", help="like T2048-R1024-H512-V32000-float32")
    parser.add_argument("--methods", nargs="+", choices=list(MAKERS), metavar="NAME")
    parser.add_argument("--tuned", metavar="FILE", help="tuned blocks, for a row of their own")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES), metavar="NAME")
    parser.add_argument("--max-seconds", type=float, default=float("inf"), help="start no pass later than this")
    parser.add_argument("--quick", action="store_true", help="first shape only, 3 runs")
    options = parser.parse_args(argv)
    options.runs = options.runs or (3 if options.quick else 7)
    options.brief = [] if options.shapes or options.methods else RISKY_SHAPES
    options.methods = options.methods or list(MAKERS)
    options.shapes = options.shapes or (shapes()[:1] if options.quick else shapes())
    return options


def run_shape(shape: Shape, methods: list[Method], options: argparse.Namespace, facts: dict[str, Any]) -> None:
    torch.compiler.reset()  # past eight recompilations of a function it would quietly run uncompiled
    problem = with_reference(make_problem(shape))
    for pass_name in options.passes:
        if time.monotonic() > options.deadline:
            print(f"left out: {shape}, {pass_name} (out of time)")
            continue
        able = [method for method in methods if pass_name in method.products and fits_shape(method, shape, options)]
        records = run_pass(shape, problem, able, pass_name, options.runs)
        rate = next((r["matmul_tflops"] for r in records if "matmul_tflops" in r), 0.0)
        print(f"\n{shape}, {pass_name}; {MATMUL}: {rate:.3f} TFLOP/s")
        print_records(records)
        append_lines(options.out, [{**facts, **asdict(shape), **record} for record in records])


def fits_shape(method: Method, shape: Shape, options: argparse.Namespace) -> bool:
    """Whether the method is to be run on a shape: tuned blocks are those of one hidden size and dtype."""
    if shape in options.brief and method.name not in BRIEFLY:
        return False
    if method.name != "fastdpo, tuned":
        return True
    from fastdpo.kernels import tuned

    like = torch.empty(
        1, shape.hidden_size, dtype=shape.torch_dtype, device="cuda" if torch.cuda.is_available() else "cpu"
    )
    with method.context():
        return tuned.tuned_fields("forward", like) is not None


def main(argv: list[str] | None = None) -> None:
    options = parse_args(argv)
    options.deadline = time.monotonic() + options.max_seconds
    if options.tuned is not None:
        os.environ[TUNED] = options.tuned
    facts = machine_facts()
    print(" ".join(f"{key}={value}" for key, value in facts.items()))
    methods, missing = available(options.methods)
    for name, reason in missing.items():
        print(f"left out: {name} ({reason})")
    for shape in options.shapes:
        try:
            run_shape(shape, methods, options, facts)
        except torch.OutOfMemoryError as error:  # of the inputs or the check: a method's own is a line of its table
            print(f"left out: the rest of {shape} ({str(error).split('. ')[0]})")
        release()


if __name__ == "__main__":
    main()
