"""Runs the tests whose verdict hangs on floating-point numbers under other arithmetic than this machine's own.

    python tests/portable.py [--each | --only NAME ...] [--quick] [--list] [pytest arguments]

In: nothing; each combination below is a set of environment variables that ATen, MKL and oneDNN read when they are
loaded, and a number of threads. Out: for each, how many of
some small computations have other bits than without it (0: this machine does not heed it), the tests' counts and time;
at the end the table again and the modules with their counts. Exit code 1 if a test fails, if a combination has
collected other names than the first, or if it has run none.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

TESTS = Path(__file__).parent
# All that multiplies. What is left out reads, formats, parses, plans, counts bytes or compares tokens.
NUMERIC = (
    "adapters", "alignment", "benchmarks/test_head_op_benchmark.py", "benchmarks/test_skipping_benchmark.py",
    "benchmarks/test_training_step.py", "evidence/test_verify.py", "integrations", "kernels/test_forward_with_grads.py",
    "kernels/test_launch.py", "kernels/test_rounds.py", "kernels/test_scratch.py", "kernels/test_sparse.py", "losses",
    "modeling", "ops", "parity", "ranking", "references", "rewards", "test_metrics.py", "training", "wrong",
)  # fmt: skip
COUNTS_BYTES = (
    "ops/test_peak_memory.py", "references/test_memory_cap.py", "training/memory/test_memory_estimate.py",
    "training/memory/test_memory_of_a_run.py",
)  # fmt: skip
# In about a minute on two cores: what CI adds to its ordinary run. Triton's interpreter adds up with NumPy, which heeds
# none of the variables: its tests are left to the whole run.
QUICK = (
    "integrations/test_linear_dpo_loss.py", "losses", "modeling/test_packed_logps.py", "modeling/test_packed_loss.py",
    "ops/test_adapter_weight.py", "ops/test_linear_cross_entropy.py", "ops/test_linear_logps.py", "ops/test_matmul.py",
    "ops/test_sequence_logps.py", "ops/test_sequence_loss.py", "wrong",
)  # fmt: skip
QUICK_CASES = ("-k", "not triton")

OLD = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
}
AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "MKL_CBWR": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}


@dataclass(frozen=True)
class Combination:
    name: str
    environment: dict[str, str] = field(default_factory=dict)
    num_threads: int = 1
    each: bool = False  # a part of another one, or of `make test`: with --each, which library a failure is from


# MKL heeds MKL_ENABLE_INSTRUCTIONS on CPUs of Intel and MKL_CBWR on any.
COMBINATIONS = (
    Combination("as it is", each=True),
    Combination("2 threads", {}, 2),
    Combination("aten default", {"ATEN_CPU_CAPABILITY": "default"}, each=True),
    Combination("aten avx2, 2 threads", {"ATEN_CPU_CAPABILITY": "avx2"}, 2, each=True),
    Combination("mkl avx2", {"MKL_ENABLE_INSTRUCTIONS": "AVX2", "MKL_CBWR": "AVX2"}, each=True),
    Combination("mkl compatible, 2 threads", {"MKL_CBWR": "COMPATIBLE"}, 2, each=True),
    Combination("onednn avx2", {"ONEDNN_MAX_CPU_ISA": "AVX2"}, each=True),
    Combination("onednn sse41", {"ONEDNN_MAX_CPU_ISA": "SSE41"}, each=True),
    Combination("all avx2", AVX2),
    Combination("all avx2, 2 threads", AVX2, 2),
    Combination("all old", OLD),
    Combination("other sums", {"FASTDPO_TEST_SUMS": "other"}),
    Combination("other sums, all old", {**OLD, "FASTDPO_TEST_SUMS": "other"}),
)
IN_CI = "other sums, all old"  # the one that differs most from a machine of today


@dataclass
class Outcome:
    combination: Combination
    num_other_bits: str
    counts: Counter
    names: list[str]
    failed: list[str]
    seconds: float

    def line(self) -> str:
        counts = ", ".join(
            f"{self.counts[kind]} {kind}" for kind in ("passed", "failed", "skipped") if self.counts[kind]
        )
        return f"{self.combination.name:26} {self.num_other_bits:>7} other bits   {counts}   {self.seconds:.0f} s"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", action="store_true", help="Also those that change one library alone.")
    parser.add_argument("--only", nargs="+", choices=[c.name for c in COMBINATIONS], help="These combinations.")
    parser.add_argument(
        "--quick", action="store_true", help=f"The quick part of the tests, under {IN_CI!r} if not --only."
    )
    parser.add_argument("--list", action="store_true", help="Print the combinations and stop.")
    parser.add_argument("--probe", action="store_true", help=argparse.SUPPRESS)
    options, arguments = parser.parse_known_args()
    if options.probe:
        print(json.dumps(probes()))
        return 0
    usually = [c.name for c in COMBINATIONS if options.each or not c.each]
    wanted = options.only or ([IN_CI] if options.quick else usually)
    chosen = [c for c in COMBINATIONS if c.name in wanted]
    if options.list:
        for c in chosen:
            print(f"{c.name:26} {c.num_threads} threads", *(f"{k}={v}" for k, v in c.environment.items()))
        return 0
    parts = QUICK if options.quick else NUMERIC
    if options.quick:
        arguments = [*QUICK_CASES, *arguments]
    usual = probes_under(COMBINATIONS[0])
    outcomes = []
    for number, combination in enumerate(chosen):
        print(f"== {combination.name}", flush=True)
        outcomes.append(run(combination, parts, usual, number, arguments))
        print(outcomes[-1].line(), *(f"  FAILED {name}" for name in outcomes[-1].failed), sep="\n", flush=True)
    return report(outcomes)


def report(outcomes: list[Outcome]) -> int:
    first = outcomes[0]
    print(f"\n{len(first.names)} tests:")
    for module, count in Counter(name.split("::")[0] for name in first.names).items():
        print(f"  {module} ({count})")
    for outcome in outcomes:
        print(outcome.line(), *(f"  FAILED {name}" for name in outcome.failed), sep="\n")
    is_right = bool(first.names)
    for outcome in outcomes:
        is_right &= not outcome.failed and outcome.counts["passed"] > 0
        if outcome.names != first.names:
            print(f"{outcome.combination.name}: other tests than under {first.combination.name}:")
            print(*sorted(set(outcome.names) ^ set(first.names)), sep="\n")
            is_right = False
    return 0 if is_right else 1


def run(combination: Combination, parts, usual, number: int, arguments: list[str]) -> Outcome:
    """The tests in processes of their own; where they have two threads each, one after the other."""
    environment = environment_of(combination) | {"PYTHONHASHSEED": str(number + 1)}  # no name hangs on it either
    processes = ["--numprocesses", "2", "--dist", "loadfile"] if combination.num_threads == 1 else []
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "results.xml")
        command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-m", "not slow", f"--junitxml={file}"]
        paths = [str(TESTS / part) for part in parts] + [f"--ignore={TESTS / part}" for part in COUNTS_BYTES]
        done = subprocess.run(
            [*command, *processes, *arguments, *paths],
            env=environment,
            cwd=TESTS.parent,
            capture_output=True,
            text=True,
        )
        if not file.exists():  # none was collected
            print(done.stdout[-4000:], done.stderr[-4000:], sep="\n")
            sys.exit(1)
        cases = list(ElementTree.parse(file).iter("testcase"))
    counts, names, failed = Counter(), [], []
    for case in cases:
        name = f"{case.get('classname', '').replace('.', '/')}::{case.get('name')}"
        kinds = {child.tag for child in case}
        kind = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        counts[kind] += 1
        names.append(name)
        if kind == "failed":
            failed.append(name)
    if failed or done.returncode:
        print(done.stdout[-20000:])
    if done.returncode and not failed:
        failed.append(f"pytest's exit code is {done.returncode}")
    found = probes_under(combination)
    other = f"{sum(found[name] != usual[name] for name in usual)}/{len(usual)}"
    return Outcome(combination, other, counts, sorted(names), failed, time.perf_counter() - started)


def environment_of(combination: Combination) -> dict[str, str]:
    threads = {"OMP_NUM_THREADS": str(combination.num_threads), "OMP_WAIT_POLICY": "passive"}
    return {**os.environ, **threads, "FASTDPO_TEST_THREADS": str(combination.num_threads), **combination.environment}


def probes_under(combination: Combination) -> dict[str, str]:
    command = [sys.executable, str(Path(__file__)), "--probe"]
    done = subprocess.run(command, env=environment_of(combination), capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def probes() -> dict[str, str]:
    """Digests of what a model's forward is made of, in each dtype."""
    import torch
    import torch.nn.functional as F

    if os.environ.get("FASTDPO_TEST_SUMS") == "other":
        import other_sums  # noqa: F401
    torch.set_num_threads(int(os.environ["FASTDPO_TEST_THREADS"]))
    g = torch.Generator().manual_seed(0)
    results = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float64):

        def draw(*shape, dtype=dtype):
            return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

        q, k, v = draw(1, 4, 33, 16), draw(1, 4, 33, 16), draw(1, 4, 33, 16)
        x = draw(257, 515)
        found = {
            "linear": F.linear(x, draw(300, 515)),
            "matmul": torch.bmm(draw(3, 17, 33), draw(3, 33, 19)),
            "logsumexp": x.logsumexp(-1),
            "sum": x.sum(),
            "norm": F.layer_norm(x, (515,)),
            "gelu": F.gelu(x),
            "attention": F.scaled_dot_product_attention(q, k, v, is_causal=True),
        }
        results |= {f"{name} {dtype}": digest(value.double().numpy()) for name, value in found.items()}
    return results


def digest(array) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()[:12]


if __name__ == "__main__":
    sys.exit(main())
