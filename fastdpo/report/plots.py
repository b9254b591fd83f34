"""Figures of runs: training curves from a trainer's log, and reward against KL. Needs matplotlib, the extra `plots`.

Figures are made without pyplot: no global state, no display, nothing to close.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")  # Okabe-Ito: told apart by everybody
REFERENCE_COLOR = "#30363d"
_AXIS_NAMES = {
    "loss": "loss (nats)",
    "rewards/margins": "reward margin (nats)",
    "rewards/accuracies": "accuracy of pairs",
}


@dataclass(frozen=True)
class Point:
    """A model on the frontier, with one standard error each way."""

    name: str
    kl: float
    reward: float
    kl_stderr: float = 0.0
    reward_stderr: float = 0.0


def require_matplotlib() -> None:
    """Raises ValueError, which says how to install it, where matplotlib is missing. Call it before any long work."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError('the report needs matplotlib, which is not installed: pip install "fastdpo[plots]"')


def training_curves(
    histories: Mapping[str, Sequence[Mapping[str, Any]]],
    keys: Sequence[str] = ("loss", "rewards/margins", "rewards/accuracies"),
) -> Any:
    """One panel per metric, one colour per run: training as a line, evaluation as a dashed line with markers.

    Args:
        histories: for each run's name its `trainer.state.log_history`.
        keys: metrics as they are logged in training; evaluation's carry the prefix `eval_`.
    Returns:
        A matplotlib Figure.
    """
    figure = _new_figure(width=3.6 * len(keys), height=3.3)
    panels = figure.subplots(1, len(keys), squeeze=False)[0]
    has_evaluation = False
    for panel, key in zip(panels, keys, strict=True):
        for index, (name, history) in enumerate(histories.items()):
            color = COLORS[index % len(COLORS)]
            trained = [(entry["step"], entry[key]) for entry in history if key in entry]
            evaluated = [(entry["step"], entry[f"eval_{key}"]) for entry in history if f"eval_{key}" in entry]
            if trained:
                panel.plot(*zip(*trained, strict=True), color=color, linewidth=1.3, alpha=0.55, label=name)
            if evaluated:
                has_evaluation = True
                panel.plot(
                    *zip(*evaluated, strict=True), color=color, linewidth=1.8, linestyle="--", marker="o", markersize=4
                )
        panel.set_xlabel("optimizer step")
        panel.set_title(_AXIS_NAMES.get(key, key), loc="left", fontsize=10)
        _clean(panel)
    handles, names = panels[0].get_legend_handles_labels()
    if has_evaluation:
        from matplotlib.lines import Line2D

        handles.append(Line2D([], [], color=REFERENCE_COLOR, linestyle="--", marker="o", markersize=4))
        names.append("held-out")
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=9)
    return figure


def frontier(points: Sequence[Point], *, best: Sequence[tuple[float, float]] = (), reward_name: str = "reward") -> Any:
    """Reward against KL to the reference.

    Args:
        points: the first one is the reference.
        best: (kl, reward) along the best that any policy could do, drawn as a line.
        reward_name: for the axis.
    Returns:
        A matplotlib Figure.
    """
    figure = _new_figure(width=7.6, height=4.4)
    panel = figure.subplots()
    if best:
        panel.plot(
            *zip(*best, strict=True), color="#8b949e", linewidth=1.4, linestyle="--", label="best possible", zorder=1
        )
    path = sorted((point.kl, point.reward) for point in points)
    panel.plot(*zip(*path, strict=True), color="#c4cad1", linewidth=1.0, zorder=1)
    for index, point in enumerate(points):
        color, marker = (REFERENCE_COLOR, "s") if index == 0 else (COLORS[(index - 1) % len(COLORS)], "o")
        panel.errorbar(
            point.kl, point.reward, xerr=point.kl_stderr, yerr=point.reward_stderr, color=color, marker=marker,
            markersize=6.5, capsize=3, linestyle="none", label=point.name, zorder=3,
        )  # fmt: skip
    panel.set_xlabel("KL(policy ‖ reference), nats per response")
    panel.set_ylabel(reward_name)
    panel.set_xlim(left=-0.04 * max(p.kl for p in points))
    panel.legend(frameon=False, fontsize=9, loc="lower right")
    _clean(panel)
    return figure


def _new_figure(*, width: float, height: float) -> Any:
    require_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _clean(panel: Any) -> None:
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

    figure = _new_figure(width=6.0, height=3.4)
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
    _clean(panel)
    return figure
