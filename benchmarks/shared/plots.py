"""Plots of the benchmarks' records: time (or speed) and memory per method, or time and error against skip_tolerance.

In: records as `records.read` gives them. Out: one PNG per machine and shape.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from fastdpo.evidence.bench.records import MACHINE, SHAPE, Record, groups, machine_of, shape_of
from fastdpo.evidence.bench.steps.tables import training_figure

OWN, OTHER, SPREAD = "#c44e52", "#8c9bb0", "#404040"


def write_plots(records: list[Record], folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for kind, draw in DRAW.items():
        of_kind = [r for r in records if _kind_of(r) == kind]
        for same in groups(of_kind, (*MACHINE, *SHAPE, "workload")).values():
            if not any("ms" in record or "pairs_per_s" in record for record in same):
                continue
            what = same[0].get("workload") or shape_of(same[0])
            figure = draw(same)
            figure.suptitle(f"{what}\n{machine_of(same[-1])}", fontsize=9)
            machine = re.sub(r"\W+", "-", same[0]["device"].lower()).strip("-")
            paths.append(folder / f"{kind}-{machine}-{what.replace(' ', '-')}.png")
            # no date or version inside, so that the same records give the same file
            figure.savefig(paths[-1], dpi=110, metadata={"Software": None})
            plt.close(figure)
    return paths


def head_op_figure(records: list[Record]) -> Figure:
    """A column per pass: milliseconds with their spread above, peak MiB below."""
    passes = groups([r for r in records if "ms" in r], ("pass",))
    names = sorted(dict.fromkeys(r["method"] for r in records if "ms" in r), key=lambda name: name == "fastdpo")
    size = (3.2 * len(passes) + 2, 0.55 * len(names) + 3)
    figure, axes = plt.subplots(2, len(passes), figsize=size, squeeze=False, sharey=True, layout="constrained")
    for column, ((name,), found) in enumerate(passes.items()):
        of = {r["method"]: r for r in found}
        for row, (key, label) in enumerate(
            (("ms", "ms, median with min and max"), ("peak_mib", "MiB added at the peak"))
        ):
            axis = axes[row][column]
            values = [of[method][key] if method in of else 0 for method in names]
            axis.barh(names, values, color=[OWN if method == "fastdpo" else OTHER for method in names])
            for place, (method, value) in enumerate(zip(names, values, strict=True)):
                right = value
                if key == "ms" and method in of:
                    right = of[method]["ms_max"]
                    axis.plot([of[method]["ms_min"], right], [place, place], color=SPREAD)
                axis.text(right, place, f" {value:.3g}" if method in of else " none", va="center", fontsize=7)
            axis.margins(x=0.18)
            axis.set_xlabel(label, fontsize=8)
            axis.tick_params(labelsize=8)
        axes[0][column].set_title(name, fontsize=9)
    axes[0][0].invert_yaxis()  # shared: the first method on top of every panel
    return figure


def skipping_figure(records: list[Record]) -> Figure:
    """Time as a share of the exact time, and what the kept tiles promise; gradient errors."""
    figure, (times, errors) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for (order,), found in groups(records, ("order",)).items():
        found = sorted((r for r in found if r["tolerance"] > 0), key=lambda r: r["tolerance"])
        x = [r["tolerance"] for r in found]
        line = _plot(times, x, [r["ms"] / r["exact_ms"] for r in found], f"measured, ids {order}", "o-")
        promised = [r["promised_ms"] / r["exact_ms"] for r in found]
        _plot(times, x, promised, "promised by kept tiles", ":", line.get_color())
        for key, style in (("dH_error", "o-"), ("dW_error", "s--")):
            _plot(errors, x, [r[key] for r in found], f"{key[:2]}, ids {order}", style, line.get_color())
    times.axhline(1.0, color=SPREAD, linewidth=0.8)
    times.set_ylim(bottom=0)
    times.set_ylabel("forward + backward, of the exact time", fontsize=8)
    errors.set_yscale("symlog", linthresh=1e-6)
    errors.set_ylabel("relative error of the gradient", fontsize=8)
    for axis in (times, errors):
        axis.set_xscale("log", base=2)
        axis.set_xlabel("skip_tolerance", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.legend(fontsize=7)
    return figure


DRAW = {"linear_logps": head_op_figure, "skipping": skipping_figure, "training_step": training_figure}


def _kind_of(record: Record) -> str:
    return "training_step" if "workload" in record else "skipping" if "tolerance" in record else "linear_logps"


def _plot(axis: Any, x: list[float], y: list[float], label: str, style: str, color: str | None = None) -> Any:
    return axis.plot(x, y, style, label=label, color=color, markersize=4)[0]
