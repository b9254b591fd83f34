"""The picture of `fastdpo plan`: the longest pair against the memory of a GPU, and the parts of the memory.

In: estimates of every candidate, and the plans of the table. Out: a page, a PNG file, or both. Of settings that
differ only in optimizer and reference, the picture shows the one with the longest pair, or with the least memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastdpo.cli.plan_names import GB, kept_activations, training_name
from fastdpo.report import Commands, Figure, FigureGrid, Table, write_report
from fastdpo.report.memory import longest_pairs, memory_bars, whole_picture
from fastdpo.training.memory.card.plans import CARDS, USABLE_SHARE, Estimates, Plan
from fastdpo.training.memory.card.settings import Settings

METHODS = {"full": "all weights", "lora": "LoRA", "qlora": "QLoRA (4-bit base)"}


def write_pictures(
    estimates: Estimates,
    plans: Sequence[Plan],
    memory: int | None,
    *,
    title: str,
    commands: Sequence[str],
    html: str | None,
    png: str | None,
) -> list[Path]:
    """Writes the files that are asked for, and returns their paths.

    Args:
        plans: those whose memory is shown part by part.
        memory: bytes of the GPU, if one is named.
        commands: what to type for the fastest setting of each kind that fits.
    """
    curves = lengths_by_memory(estimates, [*CARDS])
    bars = {_bar_name(plan): plan.estimate.parts() for plan in best_of_each(plans)}
    usable = None if memory is None else memory * USABLE_SHARE
    written = []
    if html is not None:
        written.append(write_report(html, title, _sections(curves, bars, usable, commands)))
    if png is not None:
        Path(png).parent.mkdir(parents=True, exist_ok=True)
        whole_picture(title, curves, bars, usable).savefig(png, format="png", dpi=110)
        written.append(Path(png))
    return written


def lengths_by_memory(estimates: Estimates, memories: Sequence[int]) -> dict[str, dict[str, list[tuple[float, int]]]]:
    """By method and setting, (GB, tokens of the longest pair) for each amount of memory; settings that never fit are
    left out."""
    best: dict[str, dict[str, list[int]]] = {}
    for settings, lengths in estimates.longest(memories):
        of_method = best.setdefault(METHODS[settings.method], {})
        known = of_method.setdefault(_way(settings), [0] * len(memories))
        of_method[_way(settings)] = [max(pair) for pair in zip(known, lengths, strict=True)]
    sizes = [memory / GB for memory in memories]
    return {
        method: {way: list(zip(sizes, lengths, strict=True)) for way, lengths in ways.items() if any(lengths)}
        for method, ways in best.items()
    }


def best_of_each(plans: Sequence[Plan]) -> list[Plan]:
    """One plan of those with the same name: the longest, and of equal lengths the one with the least memory."""
    best: dict[tuple[str, str], Plan] = {}
    for plan in plans:
        key = plan.settings.method, _way(plan.settings)
        if key not in best or _rank(plan) > _rank(best[key]):
            best[key] = plan
    return [plan for plan in best.values() if plan.tokens]


def _rank(plan: Plan) -> tuple[int, int]:
    return plan.tokens, -plan.estimate.total


def _way(settings: Settings) -> str:
    name = training_name(settings).removeprefix(settings.method).lstrip(" ,")
    activations = kept_activations(settings)
    kept = {"off": "no checkpointing", "on": "checkpointing"}.get(activations, activations)
    return f"{name}, {kept}" if name else kept


def _bar_name(plan: Plan) -> str:
    return f"{plan.settings.method}, {_way(plan.settings)}: {plan.tokens:,}"


def _sections(
    curves: dict[str, dict[str, list[tuple[float, int]]]],
    bars: dict[str, dict[str, int]],
    usable: float | None,
    commands: Sequence[str],
) -> list[Any]:
    drawn = {method: ways for method, ways in curves.items() if ways}
    figures = [
        (f"{method}: longest pair in tokens against the memory of the GPU", longest_pairs(method, ways))
        for method, ways in drawn.items()
    ]
    tables = [
        Table(
            f"Longest pair with {method}, by memory (GB)",
            ["", *(f"{card / GB:g}" for card in CARDS)],
            [[way, *(f"{tokens:,}" if tokens else "–" for _, tokens in points)] for way, points in ways.items()],
        )
        for method, ways in drawn.items()
    ]
    return [
        FigureGrid(
            "Longest pair",
            figures,
            "Tokens of prompt and both responses, the prompt once. Each setting has the optimizer and the reference"
            f" with the longest pair. {1 - USABLE_SHARE:.0%} of the memory stays free for fragmentation. These are"
            " estimates; none has been compared with a GPU yet.",
        ),
        *tables,
        Figure(
            "Where the bytes go",
            memory_bars(bars, usable),
            "Bytes of each part of the memory, by setting",
            "The number behind each setting is the tokens of the pair."
            + ("" if usable is None else " The dashed line is the usable memory."),
        ),
        Commands("The fastest command of each kind that fits", commands),
    ]
