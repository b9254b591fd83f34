"""Figures of runs: training curves from a trainer's log, and reward against KL. Needs matplotlib, the extra `plots`.

Figures do not use pyplot: there is no global state, no display, and nothing to close.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")  # Okabe-Ito: for colour-blind readers too
REFERENCE_COLOR = "#30363d"
MARKERS = "o^DvP*Xs"
_AXIS_NAMES = {
    "loss": "loss (nats)",
    "rewards/margins": "reward margin (nats)",
    "rewards/accuracies": "accuracy of pairs",
}


@dataclass(frozen=True)
class Point:
    """A model on the frontier, with one standard error in each direction."""

    name: str
    kl: float
    reward: float
    kl_stderr: float = 0.0
    reward_stderr: float = 0.0


@dataclass(frozen=True)
class Spot:
    """A measurement in a figure of lines, with one standard error in each direction."""

    x: float
    y: float
    x_stderr: float = 0.0
    y_stderr: float = 0.0


@dataclass(frozen=True)
class Interval:
    """A figure of one model, with the ends of its interval."""

    name: str
    value: float
    lower: float
    upper: float


def require_matplotlib() -> None:
    """Raises ValueError with the install command if matplotlib is missing. Call it before any long work."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError('the report needs matplotlib, which is not installed: pip install "fastdpo[plots]"')


def training_curves(
    histories: Mapping[str, Sequence[Mapping[str, Any]]],
    keys: Sequence[str] = ("loss", "rewards/margins", "rewards/accuracies"),
    step_name: str = "optimizer step",
) -> list[tuple[str, Any]]:
    """One figure per metric that was logged, with a colour per run.

    Args:
        histories: `trainer.state.log_history` by name of the run.
        keys: names of training metrics; evaluation metrics have the prefix `eval_`.
    Returns:
        (metric, matplotlib Figure) in the order of `keys`.
    """
    logged = {key for history in histories.values() for entry in history for key in entry}
    return [(key, _curve(histories, key, step_name)) for key in keys if {key, f"eval_{key}"} & logged]


def _curve(histories: Mapping[str, Sequence[Mapping[str, Any]]], key: str, step_name: str) -> Any:
    """Training as a line, evaluation as a dashed line with markers."""
    figure = new_figure(width=4.2, height=3.1)
    panel = figure.subplots()
    has_evaluation = False
    for index, (name, history) in enumerate(histories.items()):
        color = COLORS[index % len(COLORS)]
        trained = [(entry["step"], entry[key]) for entry in history if key in entry]
        evaluated = [(entry["step"], entry[f"eval_{key}"]) for entry in history if f"eval_{key}" in entry]
        if trained:
            panel.plot(*zip(*trained, strict=True), color=color, linewidth=1.3, alpha=0.55, label=name)
        if evaluated:
            has_evaluation = True
            label = None if trained else name
            panel.plot(
                *zip(*evaluated, strict=True),
                color=color,
                linewidth=1.8,
                linestyle="--",
                marker="o",
                markersize=4,
                label=label,
            )
    panel.locator_params(axis="x", integer=True)  # there is no step 1.5
    panel.set_xlabel(step_name)
    panel.set_title(_AXIS_NAMES.get(key, key), loc="left", fontsize=10)
    clean(panel)
    handles, names = panel.get_legend_handles_labels()
    if has_evaluation:
        from matplotlib.lines import Line2D

        handles.append(Line2D([], [], color=REFERENCE_COLOR, linestyle="--", marker="o", markersize=4))
        names.append("held-out")
    if len(names) > 1:
        ncols = min(len(names), 3)
        figure.legend(handles, names, loc="outside lower center", ncols=ncols, frameon=False, fontsize=9)
    return figure


def frontier(points: Sequence[Point], *, best: Sequence[tuple[float, float]] = (), reward_name: str = "reward") -> Any:
    """Reward against KL to the reference.

    Args:
        points: the first one is the reference.
        best: (kl, reward) along the best possible frontier, drawn as a line.
        reward_name: label of the axis.
    Returns:
        A matplotlib Figure, narrow enough for a phone. Beyond six points, the same colours come with other markers.
    """
    columns = 2 if max(len(point.name) for point in points) <= 28 else 1  # of the legend
    figure = new_figure(width=5.2, height=3.9 + 0.19 * math.ceil(len(points) / columns))
    panel = figure.subplots()
    if best:
        panel.plot(
            *zip(*best, strict=True), color="#8b949e", linewidth=1.4, linestyle="--", label="best possible", zorder=1
        )
    path = sorted((point.kl, point.reward) for point in points)
    panel.plot(*zip(*path, strict=True), color="#c4cad1", linewidth=1.0, zorder=1)
    for index, point in enumerate(points):
        turn, number = divmod(index - 1, len(COLORS))
        color, marker = (COLORS[number], MARKERS[turn % len(MARKERS)]) if index else (REFERENCE_COLOR, "s")
        panel.errorbar(
            point.kl, point.reward, xerr=point.kl_stderr, yerr=point.reward_stderr, color=color, marker=marker,
            markersize=6.5, capsize=3, linestyle="none", label=point.name, zorder=3,
        )  # fmt: skip
    panel.set_xlabel("KL(policy ‖ reference), nats per response")
    panel.set_ylabel(reward_name)
    panel.set_xlim(left=-0.04 * max(p.kl for p in points))
    figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    clean(panel)
    return figure


def lines(
    series: Mapping[str, Sequence[Spot]],
    x_name: str,
    y_name: str,
    *,
    best: Sequence[tuple[float, float]] = (),
    best_name: str = "best possible",
) -> Any:
    """A line for each name, through its measurements in the order given, with bars of one standard error.

    Args:
        series: by name. A name with a single measurement has no line.
        best: (x, y) along a dashed line for comparison.
    Returns:
        A matplotlib Figure, narrow enough for a phone.
    """
    figure = new_figure(width=5.2, height=4.2)
    panel = figure.subplots()
    if best:
        panel.plot(*zip(*best, strict=True), color="#8b949e", linewidth=1.4, linestyle="--", label=best_name, zorder=1)
    drawn = 0  # lines: beyond six, colours repeat with a dashed line
    for index, (name, spots) in enumerate(series.items()):
        style = {"color": REFERENCE_COLOR, "linestyle": "none"}
        if len(spots) > 1:
            style = {"color": COLORS[drawn % len(COLORS)], "linestyle": ("-", "--")[drawn // len(COLORS) % 2]}
            drawn += 1
        panel.errorbar(
            [spot.x for spot in spots], [spot.y for spot in spots],
            xerr=[spot.x_stderr for spot in spots], yerr=[spot.y_stderr for spot in spots],
            marker=MARKERS[index % len(MARKERS)], markersize=5.5, linewidth=1.4, label=name, zorder=3,
            **style,
        )  # fmt: skip
    panel.set_xlabel(x_name)
    panel.set_ylabel(y_name)
    figure.legend(loc="outside lower center", ncols=min(3, len(series) + bool(best)), frameon=False, fontsize=9)
    clean(panel)
    return figure


def intervals(series: Mapping[str, Sequence[Interval]], axis_name: str, *, mark: float | None = None) -> Any:
    """A row for each name, from top to bottom in the order given, and in it a point with its interval for each series.

    Args:
        series: by name; all of the same names in the same order. A legend names them where there are several.
        mark: where a line is drawn across all rows, such as chance.
    Returns:
        A matplotlib Figure, narrow enough for a phone.
    """
    names = [interval.name for interval in next(iter(series.values()))]
    figure = new_figure(width=4.8, height=1.0 + len(names) * (0.22 + 0.12 * len(series)))
    panel = figure.subplots()
    if mark is not None:
        panel.axvline(mark, color="#8b949e", linewidth=1.2, linestyle="--", zorder=1)
    for index, (label, of_series) in enumerate(series.items()):
        shift = 0.22 * (index - (len(series) - 1) / 2)
        values = [interval.value for interval in of_series]
        reach = [[i.value - i.lower for i in of_series], [i.upper - i.value for i in of_series]]
        panel.errorbar(
            values, [row + shift for row in range(len(names))], xerr=reach, color=COLORS[index % len(COLORS)],
            marker="o", markersize=5.5, capsize=3, linestyle="none", label=label, zorder=3,
        )  # fmt: skip
    panel.set_yticks(range(len(names)), [name if len(name) <= 24 else f"{name[:10]}…{name[-13:]}" for name in names])
    panel.set_ylim(len(names) - 0.5, -0.5)
    panel.set_xlabel(axis_name)
    if len(series) > 1:
        figure.legend(loc="outside lower center", ncols=len(series), frameon=False, fontsize=9)
    clean(panel)
    return figure


def new_figure(*, width: float, height: float) -> Any:
    require_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def clean(panel: Any) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(alpha=0.25, linewidth=0.6)
    panel.tick_params(labelsize=9)


def length_histogram(lengths: Mapping[str, Sequence[int]], unit: str) -> Any:
    """How many answers have which length, one outline per side, on a logarithmic axis.

    Args:
        lengths: at least one each, by side ("chosen", "rejected").
        unit: of the lengths, such as "tokens".
    Returns:
        A matplotlib Figure.
    """
    import numpy as np

    figure = new_figure(width=6.0, height=3.4)
    panel = figure.subplots()
    longest = max(max(values) for values in lengths.values())
    edges = np.geomspace(1, max(2, longest + 1), 40)
    for index, (name, values) in enumerate(lengths.items()):
        counts, _ = np.histogram(np.maximum(values, 1), edges)
        panel.stairs(counts, edges, color=COLORS[index % len(COLORS)], linewidth=1.8, label=name)
    panel.set_xscale("log")
    panel.set_xlabel(f"length of an answer ({unit})")
    panel.set_ylabel("answers")
    panel.legend(frameon=False, fontsize=9, loc="upper left")
    clean(panel)
    return figure
