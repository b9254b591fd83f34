"""What the recipes share: their options, runs that resume, means over seeds, and the files at the end.

In: the runs of a recipe, as values by setting, and a function that does one run. Out: `results.jsonl` with a line for
each finished run, a page, the table as Markdown and the figures as SVG. Refuses results of another size in one folder.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdpo.alignment.results import Estimate
from fastdpo.cli.console import make_console, quiet_libraries
from fastdpo.report import Figure, FigureGrid, Table, require_matplotlib, svg, write_report
from fastdpo.report.sections import Section
from fastdpo.rounds.sweep import RESULTS_FILE, Params, name_of, sweep
from fastdpo.training.callbacks.json_lines import read_lines

SIZES = ("small", "full", "tiny")
Line = Mapping[str, Any]  # of results.jsonl: params, the measured figures, settings


@dataclass(frozen=True)
class Options:
    """The options of every recipe."""

    size: str
    output_dir: Path


@dataclass(frozen=True)
class Group:
    """The runs that differ only in their seed: means over the seeds, with standard errors."""

    params: dict[str, str]  # without the seed
    figures: dict[str, Estimate]


def parser_of(name: str, description: str) -> argparse.ArgumentParser:
    """A parser with the options of every recipe; a recipe may add its own."""
    parser = argparse.ArgumentParser(prog=f"recipes/{name}/run.sh", description=description, allow_abbrev=False)
    size_help = "small: under 10 minutes on 2 cores (default). full: larger. tiny: seconds, for tests."
    parser.add_argument("--size", choices=SIZES, default="small", help=size_help)
    parser.add_argument(
        "--output_dir", "--output-dir", help=f"Folder for results, models and the page. Default: runs/{name}_SIZE."
    )
    return parser


def read_options(name: str, description: str, argv: Sequence[str] | None = None) -> Options:
    """The options of a recipe that has no others."""
    return options_of(name, parser_of(name, description).parse_args(argv))


def options_of(name: str, parsed: argparse.Namespace) -> Options:
    """The common part of parsed options. Raises ValueError if matplotlib is missing, before any work."""
    require_matplotlib()
    return Options(parsed.size, Path(parsed.output_dir or f"runs/{name}_{parsed.size}"))


def run_all(
    runs: Sequence[Params], options: Options, run_one: Callable[[Params, Path], dict[str, Any]], **settings: Any
) -> list[dict[str, Any]]:
    """The result of every run, with its CPU time in seconds. Runs with results in the folder are not repeated.

    Args:
        run_one: does one run in a folder of its own, and returns its figures. It is called again if it was stopped.
        settings: whatever else the results depend on.
    Raises:
        ValueError: the folder holds results of another size or of other settings.
    """
    from tqdm.auto import tqdm

    finished = {name_of(line["params"]) for line in read_lines(options.output_dir / RESULTS_FILE)}
    with quiet_libraries(), tqdm(total=len(runs), initial=len(finished & set(map(name_of, runs))), unit="run") as bar:

        def timed(params: Params, folder: Path) -> dict[str, Any]:
            bar.set_postfix_str(name_of(params))
            started = time.process_time()
            result = run_one(params, folder)
            bar.update()
            return {**result, "cpu_seconds": round(time.process_time() - started, 1)}

        return sweep(runs, options.output_dir, timed, {"size": options.size, **settings})


def over_seeds(lines: Sequence[Line], figures: Sequence[str]) -> list[Group]:
    """Groups of runs that differ only in their seed, in the order of their first run. Figures that a run of the group
    lacks, or has as null, are left out.

    Raises:
        ValueError: a group has one seed only, and so no standard error.
    """
    found: dict[str, tuple[dict[str, str], list[Line]]] = {}
    for line in lines:
        params = {name: value for name, value in line["params"].items() if name != "seed"}
        found.setdefault(name_of(params), (params, []))[1].append(line)
    groups = []
    for params, of in found.values():
        known = [figure for figure in figures if all(line.get(figure) is not None for line in of)]
        groups.append(Group(params, {figure: Estimate.of([line[figure] for line in of]) for figure in known}))
    return groups


def markdown(table: Table) -> str:
    """The table as GitHub's Markdown."""
    head = [table.columns, ["---", *["---:"] * (len(table.columns) - 1)]]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [*head, *table.rows])


def finish(options: Options, title: str, sections: Sequence[Section], *, subtitle: str = "") -> None:
    """Prints the tables, and writes page.html, table.md with all tables, and a file for each figure."""
    from rich import box
    from rich.table import Table as Printed

    console, folder = make_console(), options.output_dir
    tables = [section for section in sections if isinstance(section, Table)]
    for table in tables:
        printed = Printed(*table.columns, title=table.title, box=box.SIMPLE, title_justify="left")
        for row in table.rows:
            printed.add_row(*row)
        console.print(printed)
    wrote = [write_report(folder / "page.html", title, sections, subtitle=subtitle), folder / "table.md"]
    wrote[-1].write_text("\n".join(map(markdown, tables)), encoding="utf-8")
    figures: list[Any] = []
    for section in sections:
        figures += [section.figure] if isinstance(section, Figure) else []
        figures += [figure for _, figure in section.figures] if isinstance(section, FigureGrid) else []
    for number, figure in enumerate(figures, start=1):
        wrote.append(folder / (f"plot_{number}.svg" if len(figures) > 1 else "plot.svg"))
        wrote[-1].write_bytes(svg(figure, outlined=False))
    console.print(f"wrote {folder / RESULTS_FILE}, {', '.join(map(str, wrote))}", soft_wrap=True)


def start(main: Callable[[Sequence[str]], None]) -> None:
    """Runs the main function of a recipe. A mistake of the user's is one line and exit code 2."""
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        sys.exit(130)
