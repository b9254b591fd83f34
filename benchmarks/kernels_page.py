"""Fills the table of kernels/README.md: what the kernels compile to for three architectures and releases of Triton.

    python tests/kernels/aot_table.py --operands bf16 --architectures 80 90 100 --out benchmarks/results/kernels.jsonl
    python benchmarks/kernels_page.py            # prints the table
    python benchmarks/kernels_page.py --write    # fills kernels/README.md

In: JSON lines of `make aot`; of one kernel, architecture and release the last line counts. Out: a row per release and
architecture. A cell is registers / bytes of stack / spill instructions.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from shared import pages

from fastdpo.evidence.bench.records import Record

RESULTS, PAGE = pages.RESULTS / "kernels.jsonl", pages.DOCS.parent / "kernels" / "README.md"
COLUMNS = {  # of the table: the kernel, with what it computes
    "sums": "partials, plain",
    "sums + gradient": "partials with grads, plain",
    "the same, all options": "partials with grads, every option",
    "recomputed gradient": "logit_grads, plain",
    "the same, bias and softcap": "logit_grads, every option",
    "kept tiles": "kept logit_grads, plain",
    "dW": "products, dW",
    "dH of one round": "products, dH of one round",
}


def read() -> list[Record]:
    records = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    return list({(r["triton"], r["sm"], r["operand"], r["kernel"]): r for r in records}.values())


def table(records: Sequence[Record]) -> str:
    """Markdown, of the kernels for operands in bf16."""
    lines = [f"| Triton | sm | {' | '.join(COLUMNS)} |", "|---|---|" + "---|" * len(COLUMNS)]
    found = {(r["triton"], r["sm"], r["kernel"]): r for r in records if r["operand"] == "bf16"}
    for triton, sm in dict.fromkeys(key[:2] for key in found):
        cells = [cell(found[triton, sm, kernel]) for kernel in COLUMNS.values()]
        lines.append(f"| {triton} | {sm} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def cell(record: Record) -> str:
    return f"{record['registers']}/{record['stack']}/{record['spills']}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into kernels/README.md")
    options = parser.parse_args(argv)
    text = table(read())
    print(text, end="")
    if options.write:
        PAGE.write_text(pages.filled(PAGE.read_text(), {RESULTS.name: text}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
