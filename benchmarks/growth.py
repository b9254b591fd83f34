"""How time and memory of the head and of a step grow, as slopes on a log-log scale: docs/growth.md.

    python benchmarks/growth.py                  # the four sweeps of `fastdpo bench`, on its small model
    python benchmarks/growth.py --write vocab    # one of them, into results/growth.jsonl, the page and its plot
    python benchmarks/growth.py --docs           # page and plot from the results as they are

Times are CPU time, which other processes change less than time on the wall; on one thread they are what a machine
without other work takes. Minutes per sweep, most of them for the vocabularies.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from shared import pages

from fastdpo.cli.bench import SWEEPS
from fastdpo.cli.main import main as fastdpo
from fastdpo.evidence.bench.cases import line_through, slope
from fastdpo.evidence.bench.records import Record, groups, machine_of, read
from fastdpo.evidence.bench.steps.growth import OURS, PLAIN

RESULTS, PAGE = pages.RESULTS / "growth.jsonl", pages.DOCS / "growth.md"
PICTURE = pages.DOCS / "pictures" / "growth.svg"
SETTINGS = ("--model", "tiny", "--pairs", "2", "--max_length", "512", "--rows", "256", "--runs", "3")
FIGURES: dict[str, Callable[[Record], float]] = {
    "CPU ms": lambda record: record["cpu_ms"],
    "MiB": lambda record: record["peak_mib"],
    "MiB without gradients": lambda record: record["peak_mib"] - record["results_mib"],
}
AXES = {
    "length": "tokens of prompt and response",
    "vocab": "vocabulary",
    "batch": "prompts, of two responses each",
    "responses": "responses of each prompt",
}


def parts_of(records: Sequence[Record]) -> dict[str, str]:
    """The tables of the page, each by its sweep."""
    found = {}
    for (sweep,), own in groups(records, ("sweep",)).items():
        of = {"head": [r for r in own if "workload" not in r], "step": [r for r in own if "workload" in r]}
        text = "\n".join(table(part, what) for what, part in of.items() if part)
        found[f"{RESULTS.name}:{sweep}"] = text + (predicted(own) if sweep == "responses" else "")
    return found


def table(records: Sequence[Record], what: str) -> str:
    """Markdown: a line per figure and method, with its values at all sizes and their slope.

    The head's peak holds its gradients, so that their difference is what a method needs. A step's may come before most
    gradients exist; their size is a line of its own.
    """
    sizes = sorted({record["x"] for record in records})
    heads = [what, "method", *(f"{size:,}" for size in sizes), "slope"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    of_methods = {method: sorted(own, key=lambda r: r["x"]) for (method,), own in groups(records, ("method",)).items()}
    rows = [
        (figure, method, [value(record) for record in own])
        for figure, value in list(FIGURES.items())[: 3 if what == "head" else 2]
        for method, own in of_methods.items()
    ]
    rows.append(("MiB", "gradients alone", [record["results_mib"] for record in of_methods[OURS]]))
    for figure, method, values in rows:
        cells = [f"{one:,.0f}" if one >= 100 else f"{one:.1f}" for one in values]
        lines.append(f"| {figure} | {method} | {' | '.join(cells)} | {slope(sizes, values):.2f} |")
    return f"{machine_of(records[0])}, {records[0]['runs']} runs\n\n" + "\n".join(lines) + "\n"


def speed_ups(records: Sequence[Record]) -> list[tuple[float, float]]:
    """(raw / unique tokens, speed-up over the plain loop) at each size of a sweep."""
    plain = {record["x"]: record["cpu_ms"] for record in records if record["method"] == PLAIN}
    ours = [record for record in records if record["method"] == OURS]
    return [(r["raw_tokens"] / r["unique_tokens"], plain[r["x"]] / r["cpu_ms"]) for r in ours]


def predicted(records: Sequence[Record]) -> str:
    points = speed_ups(records)
    start, rise = line_through(*map(list, zip(*points, strict=True)))
    shown = ", ".join(f"{ratio:.2f}: {speed_up:.2f}" for ratio, speed_up in points)
    return (
        f"\nSpeed-up over the plain loop by raw / unique tokens: {shown}. The line through these points is\n"
        f"`{start:.2f} + {rise:.2f} x raw/unique`.\n"
    )


def figure(records: Sequence[Record]) -> Any:
    """Time and memory of a step, a column for each sweep."""
    from matplotlib.ticker import LogLocator, NullLocator

    from fastdpo.report.plots import COLORS, MARKERS, clean, new_figure

    drawn = new_figure(width=11, height=5)
    panels = drawn.subplots(2, len(SWEEPS), sharey="row")
    of_steps = groups([record for record in records if "workload" in record], ("sweep", "method"))
    methods = list(dict.fromkeys(method for _, method in of_steps))
    for column, sweep in enumerate(SWEEPS):
        for row, name in enumerate(("CPU ms", "MiB")):
            panel = panels[row, column]
            for index, method in enumerate(methods):
                own = of_steps.get((sweep, method), [])
                style = {"color": COLORS[index], "marker": MARKERS[index], "markersize": 4, "label": method}
                panel.loglog([r["x"] for r in own], [FIGURES[name](r) for r in own], **style)
            sizes = sorted({record["x"] for record in records if record["sweep"] == sweep})
            panel.set_xticks(sizes, [f"{size:,}" for size in sizes], fontsize=7)
            panel.set_xticks([], minor=True)
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter("{x:,.0f}")
            panel.yaxis.set_minor_locator(NullLocator())
            clean(panel)
            if row == 1:
                panel.set_xlabel(AXES[sweep], fontsize=8)
            if column == 0:
                panel.set_ylabel(name, fontsize=9)
    names = panels[0, 0].get_legend_handles_labels()
    drawn.legend(*names, loc="outside upper center", ncols=len(methods), frameon=False, fontsize=9)
    return drawn


def write_docs() -> None:
    from fastdpo.report.sections import svg

    PICTURE.write_bytes(svg(figure(read(RESULTS))))
    PAGE.write_text(pages.filled(PAGE.read_text(), parts_of(read(RESULTS))))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", nargs="*", metavar="SWEEP", help=f"of {', '.join(SWEEPS)}; default: all")
    parser.add_argument("--write", action="store_true", help="into the project's results and docs/growth.md")
    parser.add_argument("--docs", action="store_true", help="docs/growth.md from the results as they are")
    options = parser.parse_args(argv)
    if not options.docs:
        out = ["--out", str(RESULTS)] if options.write else []
        for sweep in options.sweeps or SWEEPS:
            if code := fastdpo(["bench", *SETTINGS, "--sweep", sweep, *out]):
                return code
    if options.docs or options.write:
        write_docs()
    return 0


if __name__ == "__main__":
    sys.exit(main())
