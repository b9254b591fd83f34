"""What skip_tolerance saves and costs, on softmaxes like a trained language model's: time, kept tiles, gradient errors.

    python benchmarks/bench_skipping.py [--quick] [--runs N] [--out FILE.jsonl] [--shapes ...] [--tolerances ...]

The distribution is made and measured by `heads/trained.py`; its figures stand in every record. Ids are in random order
first, then by frequency, which shows what ordering a vocabulary would be worth. "promised" is the time that the kept
share of the tiles allows: the exact forward plus that share of the exact backward. "unordered" is the kept share
without sorting rows by how sure the model is, which the op does before it makes blocks of them. Errors are relative to
the exact gradient in the same dtype (Frobenius norm); "of bound" is the error over what linear_logps's docstring allows
at that tolerance.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from heads.trained import TOP, TrainedHead, permuted, statistics, trained_head
from torch import Tensor

from fastdpo import linear_logps
from fastdpo.evidence.bench.heads.problem import Shape
from fastdpo.evidence.bench.measure import append_lines, interleaved_ms, machine_facts
from fastdpo.ops.engine import engine_of, resolve_impl
from fastdpo.ops.head import Head
from fastdpo.ops.skipping import kept_tiles, row_order

TOLERANCES = (0.0, *(2.0**-k for k in range(12, 4, -1)))
CPU_SHAPES = [Shape(1024, 1024, 512, 32000, "float32")]
GPU_SHAPES = [Shape(16384, 16384, 4096, 128256, "bfloat16")]
ORDERS: dict[str, Callable[[TrainedHead], TrainedHead]] = {"permuted": permuted, "by frequency": lambda head: head}
FORWARD = "forward"
BLOCK = 8192  # rows of dW compared at once


def shapes() -> list[Shape]:
    return GPU_SHAPES if torch.cuda.is_available() else CPU_SHAPES


def upstream_of(head: TrainedHead) -> Tensor:
    """(T,) fp32: weights of either sign, as preferred and rejected tokens have them."""
    return torch.linspace(-1, 1, len(head.labels), device=head.labels.device)


def step(head: TrainedHead, tolerance: float) -> tuple[Tensor, Tensor]:
    """dH and dW of forward and backward with this tolerance."""
    leaves = [x.detach().requires_grad_() for x in (head.hidden_states, head.weight)]
    logps = linear_logps(*leaves, head.labels, skip_tolerance=tolerance).logps
    grad_hidden, grad_weight = torch.autograd.grad(logps, leaves, upstream_of(head).to(logps.dtype))
    return grad_hidden, grad_weight


def forward(head: TrainedHead) -> Tensor:
    with torch.no_grad():
        return linear_logps(head.hidden_states, head.weight, head.labels).logps


@torch.no_grad()
def kept_shares(head: TrainedHead, tolerance: float) -> dict[str, float]:
    """Share of (row block, vocabulary tile) pairs that backward computes; and that of blocks in the rows' own order."""
    if tolerance == 0:
        return {"kept_share": 1.0, "kept_share_unordered": 1.0}
    h, w, labels = head.hidden_states, head.weight, head.labels
    engine = engine_of(resolve_impl("auto", labels.device, w.dtype))
    values = engine.forward(h, w, None, labels, Head(skip_tolerance=tolerance))
    orders = {
        "kept_share": row_order(values, labels),
        "kept_share_unordered": torch.arange(len(labels), device=labels.device),
    }
    blocks = engine.skip_blocks(h)
    return {
        name: kept_tiles(values, labels, order, tolerance, *blocks).double().mean().item()
        for name, order in orders.items()
    }


@torch.no_grad()
def gradient_errors(head: TrainedHead, tolerance: float, exact: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Errors of dH and dW, and how much of their bounds is used: |g_t| q max |W_v| per row, sum |g_t| q |h_t|."""
    with torch.enable_grad():
        found = step(head, tolerance)
    upstream = upstream_of(head).abs()
    row_errors = (found[0].double() - exact[0].double()).norm(dim=1)
    row_bounds = upstream * tolerance * head.weight.float().norm(dim=1).max()
    pieces = zip(found[1].split(BLOCK), exact[1].split(BLOCK), strict=True)
    weight_error = sum((f.double() - e.double()).square().sum() for f, e in pieces) ** 0.5
    weight_norm = sum(e.double().square().sum() for e in exact[1].split(BLOCK)) ** 0.5
    weight_bound = (upstream * head.hidden_states.float().norm(dim=1)).sum() * tolerance
    return {
        "dH_error": (row_errors.norm() / exact[0].double().norm()).item(),
        "dW_error": (weight_error / weight_norm).item(),
        "dH_of_bound": (row_errors / row_bounds).nan_to_num(0.0).amax().item() if tolerance else 0.0,
        "dW_of_bound": (weight_error / weight_bound).item() if tolerance else 0.0,
    }


def run_order(head: TrainedHead, order: str, tolerances: list[float], num_runs: int) -> list[dict[str, Any]]:
    """One record per tolerance; the exact step and the forward alone are timed in the same rounds."""
    exact = step(head, 0.0)
    records: list[dict[str, Any]] = [
        {"order": order, "tolerance": q, **kept_shares(head, q), **gradient_errors(head, q, exact)} for q in tolerances
    ]
    del exact
    gc.collect()
    jobs: dict[Any, Callable[[], Any]] = {q: partial(step, head, q) for q in {0.0, *tolerances}}
    times = interleaved_ms({**jobs, FORWARD: partial(forward, head)}, num_runs)
    forward_ms, exact_ms = times[FORWARD]["ms"], times[0.0]["ms"]
    for record in records:
        promised = forward_ms + record["kept_share"] * (exact_ms - forward_ms)
        record |= {**times[record["tolerance"]], "exact_ms": exact_ms, "promised_ms": promised, "runs": num_runs}
    return records


def print_records(records: list[dict[str, Any]]) -> None:
    heading = (
        "tolerance",
        "ms",
        "min",
        "max",
        "promised",
        "of exact",
        "kept",
        "unordered",
        "dH error",
        "dW error",
        "of bound",
    )
    print("".join(f"{title:>11}" for title in heading))
    for r in records:
        times = "".join(f"{r[key]:>11.1f}" for key in ("ms", "ms_min", "ms_max", "promised_ms"))
        shares = f"{r['ms'] / r['exact_ms']:>11.0%}{r['kept_share']:>11.1%}{r['kept_share_unordered']:>11.1%}"
        errors = f"{r['dH_error']:>11.1e}{r['dW_error']:>11.1e}{max(r['dH_of_bound'], r['dW_of_bound']):>11.2f}"
        print(f"{r['tolerance']:>11.2e}{times}{shares}{errors}")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, help="timed runs of each tolerance (default: 5, quick: 3)")
    parser.add_argument("--out", help="append one JSON line per measurement to this file")
    parser.add_argument(
        "--shapes", type=Shape.parse, nargs="+", help="like T1024-R1024-H512-V32000-float32; T is not used"
    )
    parser.add_argument("--tolerances", type=float, nargs="+", help="in [0, 1); default: 0 and 2**-12 to 2**-5")
    parser.add_argument("--quick", action="store_true", help="3 runs; of 0, 2**-12, 2**-9 and 2**-5 by default")
    options = parser.parse_args(argv)
    options.runs = options.runs or (3 if options.quick else 5)
    options.shapes = options.shapes or shapes()
    quick = [0.0, 2.0**-12, 2.0**-9, 2.0**-5]
    options.tolerances = options.tolerances or (quick if options.quick else list(TOLERANCES))
    if not all(0.0 <= q < 1.0 for q in options.tolerances):
        parser.error(f"--tolerances must lie in [0, 1), got {options.tolerances}")
    for shape in options.shapes:
        if shape.vocab_size < 2 * TOP:
            parser.error(f"--shapes must have a vocabulary of at least {2 * TOP} ids, got {shape}")
    return options


def main(argv: list[str] | None = None) -> None:
    options = parse_args(argv)
    facts = machine_facts()
    print(" ".join(f"{key}={value}" for key, value in facts.items()))
    for shape in options.shapes:
        head = trained_head(shape)
        measured = asdict(statistics(head))
        print(f"\n{shape}: " + ", ".join(f"{name} {value:.3f}" for name, value in measured.items()))
        for order, arrange in ORDERS.items():
            records = run_order(arrange(head), order, options.tolerances, options.runs)
            print(f"\nids {order}")
            print_records(records)
            append_lines(options.out, [{**facts, **asdict(shape), **measured, **record} for record in records])


if __name__ == "__main__":
    main()
