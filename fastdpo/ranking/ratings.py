"""Ratings: strengths on Arena's scale, as records for tables and files.

In: `Strengths`, and the comparisons that they come from. Out: one record for each model, the strongest first. On
Arena's scale, 1000 is the mean of all models (or the anchor), and 400 more points mean odds of 10 to 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdpo.ranking.bradley_terry import Strengths
    from fastdpo.ranking.comparisons import Comparisons

POINTS_PER_NAT = 400 / math.log(10)
CENTER = 1000.0
MEASURE_NAMES = {
    "sum": "summed log-prob",
    "mean": "log-prob per token",
    "reference": "log-prob relative to the reference",
}
SHORT_NAMES = {"sum": "summed", "mean": "per token", "reference": "vs reference"}


def rating_records(
    comparisons: Comparisons, strengths: Strengths | None, *, confidence: float = 0.95, anchor: str | None = None
) -> list[dict[str, Any]]:
    """One record for each model: model, rating, rating_lower, rating_upper, rank_best, rank_worst, strength and
    strength_stderr (nats), wins, ties, losses. Without strengths, all from rating to strength_stderr are None.

    Args:
        anchor: the model that has 1000 points. Intervals are then of the difference from this model.
    """
    records: list[dict[str, Any]] = []
    if strengths is not None:
        strengths = strengths if anchor is None else strengths.relative_to(anchor)
        intervals, ranks, stderrs = strengths.intervals(confidence), strengths.ranks(confidence), strengths.stderrs()
    for index, (model, counts) in enumerate(zip(comparisons.models, comparisons.counts().tolist(), strict=True)):
        record: dict[str, Any] = {"model": model, "rating": None, "rating_lower": None, "rating_upper": None}
        record |= {"rank_best": None, "rank_worst": None, "strength": None, "strength_stderr": None}
        if strengths is not None:
            lower, upper = intervals[index].tolist()
            record["rating"], record["rating_lower"], record["rating_upper"] = map(
                _points, (float(strengths.values[index]), lower, upper)
            )
            record["rank_best"], record["rank_worst"] = ranks[index]
            record["strength"], record["strength_stderr"] = float(strengths.values[index]), float(stderrs[index])
        records.append(record | dict(zip(("wins", "ties", "losses"), counts, strict=True)))
    return records if strengths is None else sorted(records, key=lambda record: -record["rating"])


def _points(strength: float) -> float:
    return CENTER + POINTS_PER_NAT * strength


def ranks_text(record: Mapping[str, Any]) -> str:
    """A model's range of ranks, such as "2 to 3"; empty without ranks."""
    best, worst = record["rank_best"], record["rank_worst"]
    return "" if best is None else str(best) if best == worst else f"{best} to {worst}"


def rating_cells(record: Mapping[str, Any]) -> list[str]:
    """Rating and interval as text; empty without a rating."""
    if record["rating"] is None:
        return ["", ""]
    return [f"{record['rating']:.0f}", f"{record['rating_lower']:.0f} to {record['rating_upper']:.0f}"]


def win_cells(comparisons: Comparisons, order: Sequence[str]) -> list[list[str]]:
    """For each model, the share of comparisons that it wins against each model, a tie as half a win; empty for none."""
    index = {model: number for number, model in enumerate(comparisons.models)}
    points, rows = comparisons.points(), []
    for model in order:
        cells = []
        for other in order:
            won, lost = points[index[model], index[other]], points[index[other], index[model]]
            cells.append("" if won + lost == 0 else f"{100 * won / (won + lost):.0f} %")
        rows.append(cells)
    return rows


def short_names(models: Sequence[str]) -> dict[str, str]:
    """Paths without their common parent folders: runs/a/checkpoint-10 and runs/a/checkpoint-20 become checkpoint-10 and
    checkpoint-20."""
    parts = [model.rstrip("/").split("/") for model in models]
    shared = 0
    while len(models) > 1 and all(len(own) > shared + 1 and own[shared] == parts[0][shared] for own in parts):
        shared += 1
    return {model: "/".join(own[shared:]) for model, own in zip(models, parts, strict=True)}


def counted(number: int, what: str) -> str:
    """1 prompt, 1,000 prompts."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"
