"""Fills the table of docs/gpu.md: what has run on which architecture, out of what gpu_suite.sh has left.

    python benchmarks/gpu_page.py            # prints the table
    python benchmarks/gpu_page.py --write    # fills docs/gpu.md
    python benchmarks/gpu_page.py --check    # exit code 1 if docs/gpu.md and the results disagree

In: folders that `gpu_suite.sh OUT` has written, copied to benchmarks/results/gpu/<card>/ (machine.json and results.json
are read). Out: a row per architecture that the kernels are compiled for. Dry runs do not count. Of several cards of one
architecture each has a line.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from shared import pages

PAGE, RESULTS = pages.DOCS / "gpu.md", pages.RESULTS / "gpu"
# compute capability -> cards that have it
ARCHITECTURES = {
    80: "A100, A30",
    86: "RTX 3090, A10, A40",
    89: "RTX 4090, L4, L40S",
    90: "H100, H200, GH200",
    100: "B200, GB200",
    120: "RTX 5090, RTX PRO 6000",
}
# column -> the suite's part whose verdict it shows
PARTS = {
    "GPU tests": "GPU tests",
    "tests of memory": "GPU tests of memory",
    "`fastdpo verify`": "fastdpo verify",
    "head op": "bench_linear_logps.py",
    "training step": "bench_training_step.py",
}
NOT_RUN = "not yet run"


def read(folder: Path) -> list[dict[str, Any]]:
    """The machines of a folder's runs, each with the verdicts of its parts. ValueError for a file that is none."""
    machines = []
    for path in sorted(folder.glob("*/machine.json")):
        try:
            facts = json.loads(path.read_text())
            results = json.loads(path.with_name("results.json").read_text())
            verdicts = {result["name"]: result["verdict"] for result in results}
            capability = facts["capability"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path.parent} must be a folder of gpu_suite.sh, got {error!r}") from error
        if capability and not facts.get("is_dry"):
            major, minor = capability
            machines.append({**facts, "architecture": 10 * major + minor, "verdicts": verdicts})
    return machines


def table(machines: list[dict[str, Any]]) -> str:
    lines = [
        f"| architecture | cards | compiled | {' | '.join(PARTS)} |",
        f"|---|---|---|{'---|' * len(PARTS)}",
    ]
    for number in sorted({*ARCHITECTURES, *(machine["architecture"] for machine in machines)}):
        compiled = "yes" if number in ARCHITECTURES else "no"
        ran = [machine for machine in machines if machine["architecture"] == number]
        for machine in ran:
            versions = f"torch {machine.get('torch', '?')}, Triton {machine.get('triton', '?')}"
            verdicts = " | ".join(machine["verdicts"].get(part, NOT_RUN) for part in PARTS.values())
            lines.append(f"| sm_{number} | {machine['gpu']}, {versions} | {compiled} | {verdicts} |")
        if not ran:
            lines.append(
                f"| sm_{number} | {ARCHITECTURES[number]} | {compiled} | {' | '.join([NOT_RUN] * len(PARTS))} |"
            )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="fill docs/gpu.md")
    parser.add_argument("--check", action="store_true", help="compare docs/gpu.md with the results")
    options = parser.parse_args(argv)
    found = table(read(RESULTS))
    if not options.write and not options.check:
        print(found, end="")
        return 0
    page = PAGE.read_text()
    wanted = pages.filled(page, {"gpu": found})
    if options.check:
        if page != wanted:
            print(
                "docs/gpu.md and benchmarks/results/gpu disagree: run benchmarks/gpu_page.py --write", file=sys.stderr
            )
        return int(page != wanted)
    PAGE.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
