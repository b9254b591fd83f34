"""`fastdpo compare RUN RUN ...`: shows runs side by side, as a table, JSON or a page."""

from __future__ import annotations

import json

from fastdpo.cli.options.early import check_output
from fastdpo.cli.options.parser import RaisingParser


def main(argv: list[str]) -> None:
    """Reads the runs and prints their differences.

    Raises:
        ValueError: a mistake that the user can fix.
    """
    parser = RaisingParser(
        prog="fastdpo compare", description="Shows several training runs side by side: metrics, settings, curves."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="Output folders of training runs.")
    parser.add_argument("--html", metavar="PAGE", help="Write a page with curves and samples.")
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    options = parser.parse_args(argv)
    check_output("html", options.html)
    from rich import box
    from rich.table import Table

    from fastdpo.cli.console import make_console
    from fastdpo.report.compare import compare_runs, metric_rows, write_comparison

    found = compare_runs(options.runs)
    if options.html is not None:
        write_comparison(options.html, options.runs)
    if options.json:
        print(json.dumps(found.as_json(), indent=1))
        return
    console = make_console()
    tables = {
        "at the last log (difference from the first)": metric_rows(found),
        "settings that differ": [[key, *map(str, values)] for key, values in found.settings.items()],
    }
    for title, rows in tables.items():
        table = Table(title=title, box=box.SIMPLE, title_justify="left")
        table.add_column("")
        for name in found.names:
            table.add_column(name, justify="right", overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(table if rows else f"{title}: none")
    if options.html is not None:
        console.print(f"wrote {options.html}")
