"""The tables of `fastdpo bench`: each is printed and becomes a section of the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def show(
    console: Any, sections: list[Any], title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]
) -> None:
    from rich.table import Table
    from rich.text import Text

    from fastdpo import report

    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)
    sections.append(report.Table(title, columns, rows))
