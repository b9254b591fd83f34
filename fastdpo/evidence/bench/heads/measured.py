"""Measures the head op's methods on one shape: checks each against fp64, then takes times in turn and peak memory.

In: a shape, its problem, methods. Out: one record per method; a method that is wrong, fails or does not fit has the
reason in the place of its figures.
"""

from __future__ import annotations

import gc
from typing import Any

import torch

from fastdpo.evidence.bench.heads.methods import MAKERS, Method, facts_of, job, needed_bytes
from fastdpo.evidence.bench.heads.problem import Problem, Shape, check_problem, errors
from fastdpo.evidence.bench.measure import MIB, free_bytes, interleaved_ms, matmul_job, matmul_shape, peak_mib

REFERENCE = "plain, response rows"  # whose own error against fp64 says what is wrong
OWN_LIMIT, PEER_LIMIT = 2, 10  # times that error
# A peer may be less precise than that without being wrong, say by returning log-probs in bf16: its error stands in the
# table, beside its time. F.linear_cross_entropy was seen at 4.5e-6 in fp32 (dH) and 1.3e-2 in bf16 (DPO gradients).
PEER_ALLOWANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-2}
MATMUL = "bare matmul"


def check(method: Method, pass_name: str, problem: Problem, plain_errors: dict[str, float]) -> dict[str, float]:
    """Errors of one pass against fp64. Raises AssertionError, with the numbers, for a wrong one."""
    found = errors(problem, pass_name, job(method, pass_name, problem)(), method.takes_reference)
    is_own = method.name.startswith("fastdpo")
    dtype = str(problem.weight.dtype).removeprefix("torch.")
    allowed = dict(plain_errors)
    if pass_name == "dpo loss":  # one number may be exact by luck
        allowed["values"] = max(plain_errors.values())
    for name, error in found.items():
        limit = OWN_LIMIT * allowed[name] + 1e-7 if is_own else max(PEER_LIMIT * allowed[name], PEER_ALLOWANCE[dtype])
        if not error <= limit:
            raise AssertionError(f"{name} is off by {error:.1e}, plain PyTorch by {allowed[name]:.1e}")
    return found


def run_pass(
    shape: Shape, problem: Problem, methods: list[Method], pass_name: str, num_runs: int
) -> list[dict[str, Any]]:
    """Records of every method, in the methods' order: times, or the reason why there are none."""
    small = check_problem(shape, problem)
    reference = Method(REFERENCE, {}, MAKERS[REFERENCE]().logps)
    plain_errors = errors(small, pass_name, job(reference, pass_name, small)())
    release()
    records = {m.name: {"method": m.name, "pass": pass_name, **facts_of(m, pass_name, shape)} for m in methods}
    jobs = {}
    for method in methods:
        record = records[method.name]
        try:
            if needed_bytes(method, shape) > free_bytes():
                raise MemoryError(f"needs about {needed_bytes(method, shape) / 2**30:.0f} GiB")
            record["errors"] = check(method, pass_name, small, plain_errors)
            function = job(method, pass_name, problem)
            results = function()  # compiles, so that the peak below is not the compiler's
            record["results_mib"] = sum(x.numel() * x.element_size() for x in results) / MIB
            del results
            record["peak_mib"] = peak_mib(function)
            jobs[method.name] = function
        except Exception as error:  # one method's failure is a line in the table, not the end of the run
            record["error"] = f"{type(error).__name__}: {error}".split("\n")[0]
        release()
    if not jobs:
        return list(records.values())
    bare, bare_flops = matmul_job(matmul_shape(shape.num_rows, shape.hidden_size, shape.vocab_size), shape.torch_dtype)
    times = interleaved_ms({**jobs, MATMUL: bare}, num_runs)
    same_run: dict[str, Any] = {"runs": num_runs, "matmul_tflops": bare_flops / times.pop(MATMUL)["ms"] / 1e9}
    if REFERENCE in times:
        same_run["plain_ms"] = times[REFERENCE]["ms"]
    for name, figures in times.items():
        records[name] |= {**figures, **same_run}
    return list(records.values())


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
