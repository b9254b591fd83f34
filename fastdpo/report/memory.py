"""Figures of a memory plan: the longest pair against the memory of a GPU, and where the bytes of a pair go.

In: numbers by name. Out: matplotlib Figures for a report, or all of them in one for a PNG file. Needs matplotlib, the
extra `plots`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastdpo.report.plots import COLORS, REFERENCE_COLOR, clean, new_figure

GB = 1e9
# name of a setting -> (GB of the GPU, tokens of the longest pair); 0 tokens where none fits
Curves = Mapping[str, Sequence[tuple[float, int]]]


def longest_pairs(method: str, curves: Curves) -> Any:
    """The longest pair of each setting of a method against the GPU's memory, both on logarithmic axes."""
    figure = new_figure(width=5.2, height=3.6 + 0.19 * (len(curves) + 1) // 2)
    panel = figure.subplots()
    _draw_lengths(panel, method, curves)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def memory_bars(bars: Mapping[str, Mapping[str, int]], limit: float | None = None) -> Any:
    """A bar for each setting, of its parts in bytes.

    Args:
        bars: bytes by part, by the name of the setting; all with the same parts.
        limit: bytes at which a line is drawn, such as the memory of the GPU.
    """
    figure = new_figure(width=6.4, height=1.5 + 0.3 * len(bars))
    panel = figure.subplots()
    _draw_bars(panel, bars, limit)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def whole_picture(
    title: str, curves: Mapping[str, Curves], bars: Mapping[str, Mapping[str, int]], limit: float | None = None
) -> Any:
    """The curves of each method beside each other, and the bars below them."""
    height = 4.6, 1.6 + 0.3 * len(bars)
    figure = new_figure(width=4.6 * len(curves), height=sum(height))
    figure.suptitle(title)
    upper, lower = figure.subfigures(2, 1, height_ratios=height)
    for (name, of_method), panel in zip(curves.items(), upper.subplots(1, len(curves), squeeze=False)[0], strict=True):
        _draw_lengths(panel, name, of_method)
        panel.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)
    _draw_bars(lower.subplots(), bars, limit)
    lower.legend(loc="outside lower center", ncols=8, frameon=False, fontsize=9)
    return figure


def _draw_lengths(panel: Any, method: str, curves: Curves) -> None:
    panel.set_title(method, loc="left", fontsize=10)
    sizes = sorted({size for points in curves.values() for size, _ in points})
    for index, (name, points) in enumerate(curves.items()):
        fitting = [point for point in points if point[1] > 0]
        if fitting:
            style = ("-", "--")[index // len(COLORS) % 2]
            color = COLORS[index % len(COLORS)]
            panel.plot(*zip(*fitting, strict=True), style, color=color, marker="o", markersize=3.5, label=name)
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_xlim(sizes[0] / 1.1, sizes[-1] * 1.1)
    panel.set_xticks(sizes, [f"{size:g}" for size in sizes], fontsize=8)
    panel.minorticks_off()
    panel.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    panel.set_xlabel("memory of the GPU (GB)")
    panel.set_ylabel("longest pair (tokens)")
    clean(panel)


def _draw_bars(panel: Any, bars: Mapping[str, Mapping[str, int]], limit: float | None) -> None:
    parts = list(next(iter(bars.values())))
    colors = [*COLORS, "#8b949e", "#f0e442"]
    places = range(len(bars))
    starts = [0.0] * len(bars)
    for part, color in zip(parts, colors, strict=False):
        widths = [of_bar[part] / GB for of_bar in bars.values()]
        if any(widths):
            panel.barh(places, widths, left=starts, color=color, label=part, height=0.7)
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    if limit is not None:
        panel.axvline(limit / GB, color=REFERENCE_COLOR, linewidth=1.2, linestyle="--")
    panel.set_yticks(places, list(bars), fontsize=8)
    panel.set_ylim(len(bars) - 0.5, -0.5)
    panel.set_xlabel("GB")
    clean(panel)
