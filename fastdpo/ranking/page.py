"""The HTML page of a ranking: ratings with their intervals, accuracies, pairwise win rates, and how to read them.

In: the results of `rating_records` and `rank_models`. Out: sections for `write_report`. Needs matplotlib.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastdpo.ranking.bradley_terry import Strengths
from fastdpo.ranking.comparisons import Comparisons
from fastdpo.ranking.ratings import SHORT_NAMES, ranks_text, rating_cells, short_names, win_cells
from fastdpo.report import Figure, Interval, Table, Text, intervals
from fastdpo.report.sections import Section

if TYPE_CHECKING:
    from fastdpo.ranking.models import RankedModels
    from fastdpo.ranking.shares import Share

_MOST_IN_TABLE = 20  # the table of pairwise wins is unreadable for more models


def ranking_sections(
    comparisons: Comparisons,
    strengths: Strengths | None,
    records: Sequence[Mapping[str, Any]],
    facts: Sequence[tuple[str, str]],
    *,
    ranked: RankedModels | None = None,
    no_strengths: str = "",
) -> list[Section]:
    """All sections, in the order of the page.

    Args:
        records: the result of `rating_records`.
        facts: name and text of each row of the last table.
        ranked: the result of `rank_models`; None for a file of comparisons.
        no_strengths: the reason why there are no ratings.
    """
    names = short_names(comparisons.models)
    sections: list[Section] = []
    if strengths is None:
        sections.append(Text("Ratings", [f"There are no ratings: {no_strengths}."]))
    else:
        sections += _ratings(records, names)
    if ranked is not None:
        sections += _accuracies(ranked, names)
    if len(names) <= _MOST_IN_TABLE:
        sections.append(_wins(comparisons, [record["model"] for record in records], names))
    sections.append(Text("How to read this", _reading(strengths, ranked)))
    sections.append(Table("What was compared", [], facts, is_prose=True))
    return sections


def _ratings(records: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> list[Section]:
    rows = [
        Interval(names[record["model"]], record["rating"], record["rating_lower"], record["rating_upper"])
        for record in records
    ]
    alt = "Rating of each model: " + "; ".join(f"{row.name} {row.value:.0f}" for row in rows)
    note = "Bars are intervals. If two bars overlap, look at the ranks: they show which models differ."
    cells = [
        [names[record["model"]], ranks_text(record), *rating_cells(record)]
        + [f"{record[name]:,}" for name in ("wins", "ties", "losses")]
        for record in records
    ]
    return [
        Figure("Ratings", intervals({"rating": rows}, "rating"), alt=alt, note=note),
        Table("Ratings in figures", ["Model", "Rank", "Rating", "Interval", "Wins", "Ties", "Losses"], cells),
    ]


def _accuracies(ranked: RankedModels, names: Mapping[str, str]) -> list[Section]:
    series = {
        SHORT_NAMES[measure]: [
            _interval(names[model], share) for model, share in zip(ranked.models, shares, strict=True)
        ]
        for measure, shares in ranked.accuracies.items()
    }
    rows = []
    for index, model in enumerate(ranked.models):
        longer = ranked.longer[index]
        shares = [shares[index].text() for shares in ranked.accuracies.values()]
        rows.append([names[model], *shares, "" if longer is None else longer.text()])
    alt = "Accuracy of each model: " + "; ".join(" ".join(row[:2]) for row in rows)
    columns = ["Model", *(SHORT_NAMES[measure] for measure in ranked.accuracies), "prefers the longer"]
    return [
        Figure("Accuracy on the pairs", intervals(series, "share of pairs", mark=0.5), alt=alt, note="Dashed: chance."),
        Table(
            "Accuracy in figures",
            columns,
            rows,
            note="Share of pairs in which the model prefers the chosen response by its log-prob (summed, per token or"
            " relative to the reference), with its Wilson interval. The last column is the share of pairs of unequal"
            " lengths in which it prefers the longer response.",
        ),
    ]


def _interval(name: str, share: Share) -> Interval:
    """The bar of a model; nothing is drawn for a model that has only ties."""
    if share.num_ties == share.num:
        return Interval(name, math.nan, math.nan, math.nan)
    return Interval(name, share.rate, share.lower, share.upper)


def _wins(comparisons: Comparisons, order: Sequence[str], names: Mapping[str, str]) -> Table:
    rows = [[names[model], *cells] for model, cells in zip(order, win_cells(comparisons, order), strict=True)]
    return Table(
        "Who beats whom",
        ["", *(names[model] for model in order)],
        rows,
        note="Share of comparisons that the row's model wins against the column's model. A tie is half a win.",
    )


def _reading(strengths: Strengths | None, ranked: RankedModels | None) -> list[str]:
    paragraphs = []
    if strengths is not None:
        paragraphs.append(
            "Ratings are Bradley-Terry strengths on Arena's scale. 400 points more mean odds of 10 to 1, 100 points a"
            " win in 64 % of comparisons. The rank is a range if the data cannot separate the model from others."
        )
    if ranked is not None:
        paragraphs.append(
            "Each pair of models is compared on every preference pair. A model wins if it is right and the other is"
            " not, or if its margin is larger; the table below says which rule applies. Ties pull ratings together, so"
            " compare ratings only within one page."
        )
    if strengths is not None and strengths.length_slope is not None:
        paragraphs.append("Ratings apply to responses of equal length: the effect of length is fitted and removed.")
    return paragraphs
