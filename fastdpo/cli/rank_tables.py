"""The tables that `fastdpo rank` prints: accuracies, ratings, and facts about the comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from fastdpo.ranking.bradley_terry import FEW_CLUSTERS, Strengths
from fastdpo.ranking.comparisons import Comparisons
from fastdpo.ranking.ratings import SHORT_NAMES, counted, ranks_text, rating_cells, short_names, win_cells

if TYPE_CHECKING:
    from fastdpo.ranking.models import RankedModels

MOST_COLUMNS = 8  # models whose wins against each other are printed; a page has those of all


def print_ranking(
    console: Console,
    comparisons: Comparisons,
    strengths: Strengths | None,
    records: Sequence[Mapping[str, Any]],
    facts: Sequence[tuple[str, str]],
    confidence: float,
    ranked: RankedModels | None = None,
) -> None:
    """Prints the tables, and below them the facts about the comparison."""
    names = short_names(comparisons.models)
    if ranked is not None:
        console.print(_accuracies(ranked, names))
    if strengths is None:
        assert ranked is not None
        console.print(f"no ratings: {ranked.no_strengths}", markup=False, highlight=False)
    else:
        console.print(_ratings(records, names, confidence))
    if 2 < len(comparisons.models) <= MOST_COLUMNS:  # of two models, wins and losses above say the same
        console.print(_wins(comparisons, [record["model"] for record in records], names))
    about = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    about.add_column(style="bold", overflow="fold")
    about.add_column(overflow="fold")
    for name, text in facts:
        about.add_row(_plain(name), _plain(text))
    console.print(about)
    if strengths is not None and strengths.num_clusters < FEW_CLUSTERS:
        clusters = counted(strengths.num_clusters, "comparison" if comparisons.clusters is None else "prompt")
        console.print(f"only {clusters}: intervals are too narrow for fewer than {FEW_CLUSTERS}", highlight=False)


def _accuracies(ranked: RankedModels, names: Mapping[str, str]) -> Table:
    table = _table("which response each model prefers", "model")
    for measure in ranked.accuracies:
        table.add_column(f"accuracy, {SHORT_NAMES[measure]}", justify="right", no_wrap=True)
    table.add_column("prefers the longer", justify="right", no_wrap=True)
    for index, model in enumerate(ranked.models):
        longer = ranked.longer[index]
        cells = [shares[index].text() for shares in ranked.accuracies.values()]
        table.add_row(_plain(names[model]), *cells, "" if longer is None else f"{100 * longer.rate:.1f} %")
    return table


def _ratings(records: Sequence[Mapping[str, Any]], names: Mapping[str, str], confidence: float) -> Table:
    table = _table("Bradley-Terry ratings", "rank", "model")
    for name in ("rating", f"{confidence:.0%} interval", "wins", "ties", "losses"):
        table.add_column(name, justify="right", no_wrap=True)
    for record in records:
        counts = [f"{record[name]:,}" for name in ("wins", "ties", "losses")]
        table.add_row(ranks_text(record), _plain(names[record["model"]]), *rating_cells(record), *counts)
    return table


def _wins(comparisons: Comparisons, order: Sequence[str], names: Mapping[str, str]) -> Table:
    table = _table("who beats whom: the row's share of wins", "model")
    for model in order:
        table.add_column(_plain(names[model]), justify="right", overflow="fold")
    for model, cells in zip(order, win_cells(comparisons, order), strict=True):
        table.add_row(_plain(names[model]), *cells)
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in columns:
        table.add_column(name, overflow="fold", no_wrap=name == "rank")
    return table


def _plain(text: str) -> Any:
    """Text from users. Brackets in it are not markup."""
    from rich.text import Text

    return Text(text)
