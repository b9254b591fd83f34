"""Tables that stand in pages, between `<!-- table: FILE.jsonl -->` and `<!-- end -->`, made anew from their records."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results"
DOCS = Path(__file__).parents[2] / "docs"
MARKED = re.compile(r"(<!-- table: (\S+\.jsonl) -->\n).*?(<!-- end -->)", re.DOTALL)


def named_files(page: str) -> list[Path]:
    """The results of which the page has a table."""
    return [RESULTS / match[2] for match in MARKED.finditer(page)]


def filled(page: str, table_of: Callable[[Path], str]) -> str:
    """The page with every marked table replaced by that of its file in benchmarks/results."""
    return MARKED.sub(lambda match: match[1] + table_of(RESULTS / match[2]) + match[3], page)
