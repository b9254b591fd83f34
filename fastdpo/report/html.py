"""Writes sections to one self-contained HTML file: style and figures are inside, no network is needed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path

from fastdpo.files import write_whole
from fastdpo.report.sections import Section

_STYLE = """
:root { --ink: #1c2430; --soft: #5b6675; --line: #dde2e8; --band: #f5f7f9; --accent: #0b5cad; }
* { box-sizing: border-box; }
:root { --page: #fff; color-scheme: light dark; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #dfe5ec; --soft: #98a4b3; --line: #2f3742; --band: #1b212a; --accent: #6cb1f5; --page: #12161c; }
}
body { margin: 0; color: var(--ink); background: var(--page);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
header { border-bottom: 3px solid var(--accent); margin-bottom: 2rem; padding-bottom: 1rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em; }
header p { margin: 0; color: var(--soft); font-size: 1.05rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .7rem; }
p { margin: 0 0 .8rem; max-width: 46rem; }
.note { color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; margin-bottom: .8rem; }
table { border-collapse: collapse; width: 100%; font-size: .93rem; }
th, td { padding: .45rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
thead th { color: var(--soft); font-weight: 600; border-bottom: 2px solid var(--line); vertical-align: bottom; }
tbody th { font-weight: 600; white-space: nowrap; }
table.figures td, table.figures thead th:not(:first-child) { text-align: right; font-variant-numeric: tabular-nums; }
table.figures th, table.figures td { padding: .45rem .5rem; }
table.figures td { white-space: nowrap; }
table.figures tbody tr:nth-child(odd) { background: var(--band); }
table.prose tbody th { width: 13rem; white-space: normal; font-weight: 500; color: var(--soft); }
table.samples { table-layout: fixed; min-width: 32rem; }
table.samples th:first-child { width: 9.5rem; }
table.samples th:last-child, table.samples td:last-child { width: 7.5rem; text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
article { margin: 0 0 1.6rem; }
.prompt { margin: 0; padding: .5rem .8rem; max-width: none; background: var(--band);
  border-left: 3px solid var(--accent); font-weight: 500; white-space: pre-wrap; overflow-wrap: anywhere; }
table.samples td:nth-of-type(1) { white-space: pre-wrap; overflow-wrap: anywhere; }
.coloured { max-width: none; margin: .5rem .8rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.command { margin: 0 0 .8rem; padding: .5rem .8rem; background: var(--band); font-size: .9rem; overflow-x: auto; }
.coloured span { border-radius: 2px; }
figure { margin: 0 0 .6rem; }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; background: #fff; border-radius: 4px; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(18rem, 100%), 1fr)); gap: .8rem; }
footer { margin-top: 3rem; padding-top: .8rem; border-top: 1px solid var(--line); color: var(--soft);
  font-size: .85rem; }
@media (min-width: 75rem) { .scroll.wide { margin-inline: -6rem; } }
@media (max-width: 34rem) {
  main { padding: 1.5rem .9rem 3rem; }
  table { font-size: .84rem; }
  th, td { padding: .35rem .4rem; }
  tbody th { white-space: normal; overflow-wrap: anywhere; min-width: 7.6rem; }
  table.figures th, table.figures td { padding: .35rem .3rem; }
  table.figures td:not(.word) { white-space: normal; }
  table.prose tbody th { width: auto; }
  table.samples { min-width: 0; }
  table.samples th:first-child { width: 6rem; }
  table.samples th:last-child, table.samples td:last-child { width: 5.9rem; }
  table.samples thead th:last-child { white-space: normal; }
}
@media print { main { max-width: none; padding: 0; } article, figure { break-inside: avoid; } }
"""


def write_report(path: str | os.PathLike[str], title: str, sections: Sequence[Section], *, subtitle: str = "") -> Path:
    """Writes the report atomically and returns its path.

    Args:
        path: path of the HTML file; missing folders are created.
        title, subtitle: plain text.
        sections: the sections in order.
    """
    from fastdpo import __version__

    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>",
        f"<style>{_STYLE}</style></head><body><main>",
        f"<header><h1>{escape(title)}</h1>{f'<p>{escape(subtitle)}</p>' if subtitle else ''}</header>",
        *(f"<section><h2>{escape(section.title)}</h2>\n{section.body()}</section>" for section in sections),
        f"<footer>Written by fastdpo {escape(__version__)}.</footer>",
        "</main></body></html>\n",
    ]
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, "\n".join(parts))
    return target
