"""`fastdpo bench`: time and peak memory of the head op and of whole training steps, on this machine.

In: a model (preset, folder or name; its weights are random), and a preference dataset or a length profile. Out: tables
of fastdpo, its features switched off one by one, plain PyTorch and TRL where it is installed; --out appends JSON lines,
and --report writes an HTML page with plots. --sweep measures four sizes and fits log-log slopes. Methods take turns;
figures are medians with minimum and maximum. A method whose numbers are wrong has the reason and no speed.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from dataclasses import asdict
from typing import Any

from fastdpo.cli.bench_tables import show
from fastdpo.cli.options.parser import RaisingParser

SWEEPS = ("length", "vocab", "batch", "responses")
ALWAYS = ("plain, response rows", "fastdpo", "TRL")
FEATURES = (
    "fastdpo, cached",
    "fastdpo, cached, unshared",
    "fastdpo, cached, padded",
    "fastdpo, cached, full logits",
    "fastdpo, cached, recompute",
)
PEERS = ("plain, response rows", "F.linear_cross_entropy", "Liger", "CCE", "TRL", "fastdpo")
SWEPT = ("plain, response rows", "fastdpo")


def main(argv: list[str]) -> int:
    """Measures and reports; returns 1 if fastdpo itself has no figures because its numbers are wrong.

    Raises:
        ValueError: an error that the user can fix.
    """
    options = _parse(argv)
    import torch

    from fastdpo.cli.console import make_console
    from fastdpo.evidence.bench.cases import check_fits, make_workload
    from fastdpo.evidence.bench.measure import machine_facts
    from fastdpo.evidence.bench.steps.workloads import dataset_rows

    if options.report:
        from fastdpo.report import require_matplotlib

        require_matplotlib()
    on_gpu = torch.cuda.is_available()
    model = options.model or ("1B" if on_gpu and not options.quick else "tiny")
    dtype = options.dtype or ("bfloat16" if on_gpu else "float32")
    pairs = options.pairs or (16 if on_gpu else 2 if options.quick else 4)
    workload = make_workload(model, options.vocab, options.dataset, options.profile, pairs, options.max_length, dtype)
    if options.dataset:
        dataset_rows(options.dataset)
    if options.only != "head" and not options.sweep:
        check_fits(workload)
    facts = machine_facts()
    console = make_console()
    console.print(", ".join(f"{name} {value}" for name, value in facts.items() if value is not None), markup=False)
    sections: list[Any] = []
    records: list[dict[str, Any]] = []
    num_rows = options.rows or (16384 if on_gpu and not options.quick else 512)
    if options.sweep:
        from fastdpo.cli.bench_sweep import sweep

        records += sweep(options, workload, num_rows, facts, console, sections)
    else:
        if options.only != "steps":
            records += _head(options, workload, num_rows, facts, console, sections)
        if options.only != "head":
            records += _steps(options, workload, on_gpu, facts, console, sections)
    if options.report:
        from fastdpo.report import write_report

        path = write_report(options.report, "fastdpo bench", sections, subtitle=f"{workload.name}; {facts['device']}")
        console.print(f"report: {path}")
    return 1 if any("error" in r and r["method"].startswith("fastdpo") for r in records) else 0


def _parse(argv: list[str]) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = RaisingParser(prog="fastdpo bench", description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument(
        "--model", help="tiny, 0.5B, 1B, 8B, or a folder or name of a model; default: tiny on a CPU, 1B on a GPU"
    )
    parser.add_argument("--vocab", help="llama3, qwen3, gemma3 or a number; default: the model's")
    parser.add_argument("--dataset", help="preference data in any form that `fastdpo train` reads")
    parser.add_argument("--profile", default="hh", help="lengths without a dataset: hh, ultrafeedback or long")
    parser.add_argument("--pairs", type=int, help="pairs of a step; default: 4 on a CPU (2 with --quick), 16 on a GPU")
    parser.add_argument("--max_length", "--max-length", type=int, help="most tokens of a prompt and one response")
    parser.add_argument("--rows", type=int, help="response rows of the head alone; default: 512, on a GPU 16,384")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32, bf16 on a GPU")
    parser.add_argument("--only", choices=("head", "steps"), help="measure one of the two")
    parser.add_argument("--sweep", choices=SWEEPS, help="a step at four sizes, with log-log slopes")
    parser.add_argument("--runs", type=int, help="timed runs of the head; default: 7, with --quick 3")
    parser.add_argument("--steps", type=int, help="timed steps of a turn; default: 4, with --quick 2")
    parser.add_argument("--rounds", type=int, help="turns of each method; default: 3, with --quick 1")
    parser.add_argument("--quick", action="store_true", help="few runs of few methods: a minute on a laptop")
    parser.add_argument("--out", help="append one JSON line per measurement to this file")
    parser.add_argument("--report", help="write an HTML page with tables and plots")
    options = parser.parse_args(argv)
    for name in ("pairs", "rows", "runs", "steps", "rounds"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if options.rows is not None and options.rows < 16:
        raise ValueError(f"rows must be at least 16, got {options.rows}")
    if options.steps == 1:
        raise ValueError("steps must be at least 2 (the losses of three steps are compared), got 1")
    options.runs = options.runs or (3 if options.quick else 7)
    options.steps = options.steps or (2 if options.quick else 4)
    options.rounds = options.rounds or (1 if options.quick else 3)
    return options


def _head(
    options: argparse.Namespace, workload: Any, num_rows: int, facts: dict[str, Any], console: Any, sections: list[Any]
) -> list[dict[str, Any]]:
    from fastdpo.evidence.bench.cases import make_shape
    from fastdpo.evidence.bench.heads.measured import run_pass
    from fastdpo.evidence.bench.heads.methods import available
    from fastdpo.evidence.bench.heads.problem import make_problem, with_reference
    from fastdpo.evidence.bench.measure import append_lines

    shape = make_shape(workload, num_rows - num_rows % 16)
    methods, missing = available(list(SWEPT if options.quick else PEERS))
    for name, reason in missing.items():
        console.print(f"left out: {name} ({reason})", markup=False)
    problem = with_reference(make_problem(shape))
    found: list[dict[str, Any]] = []
    for name in ("forward+backward",) if options.quick else ("forward", "forward+backward", "dpo loss"):
        records = run_pass(shape, problem, [m for m in methods if name in m.products], name, options.runs)
        records = [{**facts, **asdict(shape), **record} for record in records]
        append_lines(options.out, records)
        rows = [_head_cells(record) for record in records]
        show(console, sections, f"Head, {name}, {shape}", ("method", "ms", "min to max", "peak MiB", "error"), rows)
        found += records
    return found


def _head_cells(record: dict[str, Any]) -> tuple[str, ...]:
    if "ms" not in record:
        return (record["method"], record.get("error", "not measured"), "", "", "")
    spread = f"{record['ms_min']:.1f} to {record['ms_max']:.1f}"
    error = f"{max(record['errors'].values()):.0e}"
    return (record["method"], f"{record['ms']:.1f}", spread, f"{record['peak_mib']:.1f}", error)


def _steps(
    options: argparse.Namespace, workload: Any, on_gpu: bool, facts: dict[str, Any], console: Any, sections: list[Any]
) -> list[dict[str, Any]]:
    from fastdpo.evidence.bench.measure import append_lines
    from fastdpo.evidence.bench.steps.measured import measure
    from fastdpo.evidence.bench.steps.methods import METHODS, Job
    from fastdpo.evidence.bench.steps.worker import Worker

    names = [*ALWAYS, *(() if options.quick else FEATURES)]
    if on_gpu:
        names = ["TRL, defaults" if name == "TRL" else name for name in names]
    if any(METHODS[name].kind == "trl" for name in names) and importlib.util.find_spec("trl") is None:
        console.print("left out: TRL (not installed: pip install trl)")
        names = [name for name in names if METHODS[name].kind != "trl"]
    jobs = {name: Job(workload.name, name, 1, options.steps, asdict(workload)) for name in names}
    worker = Worker()
    started = time.perf_counter()
    try:
        with console.status("training steps, each method in its turn"):
            found = measure(
                jobs, worker, options.rounds, lambda record: append_lines(options.out, [{**facts, **record}])
            )
    finally:
        worker.close()
    records = [{**facts, **found[name]} for name in names]
    base = found.get("plain, response rows", {}).get("pairs_per_s")
    columns = ("method", "pairs/s", "min to max", "x plain", "peak MiB", "losses off")
    title = f"Training steps: {workload.name}, {workload.pairs_per_step} pairs a step"
    show(console, sections, title, columns, [_step_cells(record, base) for record in records])
    cached = found.get("fastdpo, cached", {})
    off = [r for r in records if r.get("off") and "pairs_per_s" in r]
    if "pairs_per_s" in cached and off:
        rows = [
            (
                r["off"],
                f"{cached['pairs_per_s'] / r['pairs_per_s']:.2f}",
                f"{r['peak_mib'] - cached['peak_mib']:,.0f}",
            )
            for r in off
        ]
        show(console, sections, "Features switched off", ("without", "x slower", "peak MiB added"), rows)
    if options.report and any("pairs_per_s" in r for r in records):
        from fastdpo.evidence.bench.steps.tables import training_figure
        from fastdpo.report import Figure

        sections.append(Figure("Speed and memory", training_figure(records), "pairs per second and peak memory"))
    console.print(f"{time.perf_counter() - started:.0f} s; peak MiB is resident memory of the process on a CPU")
    return records


def _step_cells(record: dict[str, Any], base: float | None) -> tuple[str, ...]:
    if "pairs_per_s" not in record:
        return (record["method"], record.get("error", "not measured"), "", "", "", "")
    spread = f"{record['pairs_per_s_min']:.3g} to {record['pairs_per_s_max']:.3g}"
    ratio = f"{record['pairs_per_s'] / base:.2f}" if base else ""
    peak, off = f"{record['peak_mib']:,.0f}", f"{record['loss_off']:.0e}"
    return (record["method"], f"{record['pairs_per_s']:.3g}", spread, ratio, peak, off)
