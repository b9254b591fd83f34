"""Draws docs/pictures/speed.svg from benchmarks/results/training_step.jsonl: the README's table as bars.

    python docs/site/speed_plot.py

Pairs per second and peak memory of TRL, a plain loop and fastdpo, on short and on long pairs, with a live and with a
cached reference. Uses the newest record of each, as the README does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from fastdpo.report.plots import COLORS, clean, new_figure
from fastdpo.report.sections import svg

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "benchmarks" / "results" / "training_step.jsonl"
PICTURE = ROOT / "docs" / "pictures" / "speed.svg"
METHODS = {  # method of the records -> (name, color)
    "TRL": ("TRL", "#8c9bb0"),
    "plain, response rows": ("plain loop", "#5b6b82"),
    "fastdpo": ("fastdpo", COLORS[1]),
}
PANELS = (("short", "pairs_per_s"), ("long", "pairs_per_s"), ("short", "peak_mib"), ("long", "peak_mib"))
AXES = {"pairs_per_s": "pairs per second", "peak_mib": "peak memory (MiB)"}


def bars(records: list[dict[str, Any]], workload: str, key: str) -> list[tuple[str, str, float]]:
    """(label, color, value) of each bar, from top to bottom."""
    found = {r["method"]: r[key] for r in records if r["workload"] == workload and key in r}
    return [
        (f"{name}{suffix}", color, found[method + suffix])
        for suffix in ("", ", cached")
        for method, (name, color) in METHODS.items()
    ]


def figure(records: list[dict[str, Any]]) -> Any:
    drawn = new_figure(width=9.6, height=4.2)
    for place, (workload, key) in enumerate(PANELS, 1):
        panel = drawn.add_subplot(2, 2, place)
        labels, colors, values = zip(*bars(records, workload, key), strict=True)
        panel.barh(labels, values, color=colors)
        for row, value in enumerate(values):
            shown = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"  # as in the README
            panel.text(value, row, f" {shown}", va="center", fontsize=8)
        panel.invert_yaxis()
        panel.margins(x=0.14)
        panel.set_title(f"{workload} pairs: {AXES[key]}", fontsize=9, loc="left")
        panel.tick_params(labelsize=8)
        if place % 2 == 0:
            panel.set_yticklabels([])
        clean(panel)
    return drawn


def main() -> int:
    records = [json.loads(line) for line in RECORDS.read_text().splitlines()]
    PICTURE.write_bytes(svg(figure(records)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
