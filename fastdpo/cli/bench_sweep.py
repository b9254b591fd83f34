"""`fastdpo bench --sweep`: how time and memory of the head and of a step grow, as slopes on a log-log scale.

In: the options of `fastdpo bench` and the workload. Out: records, tables, and plots for the report. The head is swept
by vocabulary alone: its other sizes are numbers of rows, which a step's sweep shows.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from typing import Any

from fastdpo.cli.bench_tables import show
from fastdpo.evidence.bench.cases import line_through, make_shape, slope

Record = dict[str, Any]


def sweep(
    options: argparse.Namespace, workload: Any, num_rows: int, facts: Record, console: Any, sections: list[Any]
) -> list[Record]:
    """Measures, prints, appends to --out and adds sections; returns the records."""
    found: list[Record] = []
    if options.only != "steps" and options.sweep == "vocab":
        found += _shown("head", _head(options, workload, num_rows, facts), options, console, sections)
    if options.only != "head":
        found += _shown("step", _steps(options, workload, facts), options, console, sections)
    return found


def _head(options: argparse.Namespace, workload: Any, num_rows: int, facts: Record) -> list[Record]:
    from fastdpo.evidence.bench.heads.measured import run_pass
    from fastdpo.evidence.bench.heads.methods import available
    from fastdpo.evidence.bench.heads.problem import make_problem, with_reference
    from fastdpo.evidence.bench.measure import append_lines
    from fastdpo.evidence.bench.steps.growth import OURS, PLAIN, vocab_sizes

    methods, _ = available([PLAIN, OURS])
    found: list[Record] = []
    for size in vocab_sizes(workload):
        shape = replace(make_shape(workload, num_rows - num_rows % 16), vocab_size=size)
        records = run_pass(shape, with_reference(make_problem(shape)), methods, "forward+backward", options.runs)
        records = [{**facts, **asdict(shape), "sweep": "vocab", "x": size, **record} for record in records]
        append_lines(options.out, records)
        found += records
    return found


def _steps(options: argparse.Namespace, workload: Any, facts: Record) -> list[Record]:
    from fastdpo.evidence.bench.measure import append_lines
    from fastdpo.evidence.bench.steps.growth import grown

    found: list[Record] = []
    for of_size in grown(options.sweep, workload, options.runs):
        records = [{**facts, "workload": workload.name, "sweep": options.sweep, **record} for record in of_size]
        append_lines(options.out, records)
        found += records
    return found


def _shown(
    what: str, records: list[Record], options: argparse.Namespace, console: Any, sections: list[Any]
) -> list[Record]:
    methods = list(dict.fromkeys(r["method"] for r in records))
    plain = {r["x"]: r["ms"] for r in records if r["method"] == methods[0] and "ms" in r}
    is_step = what == "step"
    columns = (options.sweep, "method", "ms", "min to max", "x plain", "peak MiB", *(["raw/unique"] if is_step else []))
    show(console, sections, f"{what}, forward + backward", columns, [_cells(r, plain, is_step) for r in records])
    rows = []
    for method in methods:
        of = [r for r in records if r["method"] == method and "ms" in r]
        if len(of) < 2:
            rows.append((method, "not measured", "", ""))
            continue
        xs = [float(r["x"]) for r in of]
        # of a step, the peak may come before most gradients exist
        beyond = [] if is_step else [r["peak_mib"] - r["results_mib"] for r in of]
        cells = [slope(xs, [r["ms"] for r in of]), slope(xs, [r["peak_mib"] for r in of])]
        last = f"{slope(xs, beyond):.2f}" if beyond and min(beyond) > 0 else ""
        rows.append((method, *(f"{value:.2f}" for value in cells), last))
    columns = ("method", "time", "peak memory", "memory beyond gradients")
    width = 4 if any(row[3] for row in rows) else 3
    title = f"{what}: slopes on a log-log scale (1: proportional to {options.sweep}, 0: does not grow)"
    show(console, sections, title, columns[:width], [row[:width] for row in rows])
    if is_step:
        _predict(records, plain, methods[1], console)
    if options.report:
        from fastdpo.report import Figure

        sections.append(Figure(f"Growth of the {what}", _plot(records, options.sweep), f"by {options.sweep}"))
    return records


def _cells(record: Record, plain: dict[int, float], is_step: bool) -> tuple[str, ...]:
    name = (str(record["x"]), record["method"])
    last = (f"{record['raw_tokens'] / record['unique_tokens']:.2f}",) if is_step else ()
    if "ms" not in record:
        return (*name, record.get("error", "not measured"), "", "", "", *last)
    ratio = f"{plain[record['x']] / record['ms']:.2f}" if record["x"] in plain else ""
    spread = f"{record['ms_min']:.1f} to {record['ms_max']:.1f}"
    return (*name, f"{record['ms']:.1f}", spread, ratio, f"{record['peak_mib']:.1f}", *last)


def _predict(records: list[Record], plain: dict[int, float], ours: str, console: Any) -> None:
    """The line through (raw / unique tokens, speed-up): `fastdpo data inspect` prints both counts of a dataset."""
    of = [r for r in records if r["method"] == ours and "ms" in r and r["x"] in plain]
    xs = [r["raw_tokens"] / r["unique_tokens"] for r in of]
    if len({round(x, 3) for x in xs}) < 2:
        return
    start, rise = line_through(xs, [plain[r["x"]] / r["ms"] for r in of])
    console.print(
        f"speed-up over plain = {start:.2f} + {rise:.2f} x raw/unique tokens, through {len(of)} points;"
        " `fastdpo data inspect` counts both for your data",
        markup=False,
    )


def _plot(records: list[Record], swept: str) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    for panel, key, label in zip(
        figure.subplots(1, 2), ("ms", "peak_mib"), ("ms, median", "MiB added at the peak"), strict=True
    ):
        for method in dict.fromkeys(r["method"] for r in records):
            of = [r for r in records if r["method"] == method and "ms" in r]
            panel.loglog([r["x"] for r in of], [r[key] for r in of], "o-", label=method)
        panel.set_xlabel(swept)
        panel.set_ylabel(label)
        panel.legend(fontsize=8)
    return figure
