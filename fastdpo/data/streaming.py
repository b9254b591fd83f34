"""A stream of examples (`datasets.IterableDataset`) as a stream of token columns, tokenized as it is read.

In: as `prepare`. Out: the same columns in the order of the stream, without rows that cannot be used; these are counted
where the stream is read, and the first of each kind is told at once. Nothing is kept: another epoch tokenizes again.
Refused with ValueError: what `rows` refuses, in the first row at once; formats whose rows are not prompts by themselves
and have to be read as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from fastdpo.data.forms.formats import regrouped
from fastdpo.data.rows.columns import GROUP_COLUMNS, RowPreparer, column_features, group_from_columns
from fastdpo.data.rows.first_row import row_lines
from fastdpo.data.rows.report import StreamReport
from fastdpo.data.sources.loading import raw_example
from fastdpo.data.tokens.notes import Note
from fastdpo.data.tokens.tokenization import TokenizationSettings
from fastdpo.types import TokenizedGroup

if TYPE_CHECKING:
    from datasets import IterableDataset

ROWS_AT_ONCE = 16  # tokenized together: a run on a stream starts soon


def prepare_stream(
    dataset: IterableDataset, tokenizer: Any, settings: TokenizationSettings, *, is_sft: bool
) -> tuple[IterableDataset, StreamReport]:
    """The stream with GROUP_COLUMNS, and a report that grows as it is read in this process.

    Raises:
        ValueError: the stream is empty, or its first row is of no known format.
    """
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError("dataset must hold at least one row, got an empty stream")
    if regrouped((), raw_example(first, dataset.features or {}), settings.dataset_format, is_sft=is_sft) is not None:
        raise ValueError(
            "dataset must not be streamed where its rows are single answers or trees, which have to be read as a"
            " whole: load it without streaming=True"
        )
    features = dataset.features or {}
    prepare = RowPreparer(tokenizer, settings, is_sft, features)
    columns = prepare.columns([first], [0])[0]["columns"]
    report = StreamReport("examples" if is_sft else "pairs")
    report.first_row = row_lines([raw_example(first, features)], settings, is_sft=is_sft)
    report.add_columns(0, columns)
    prepared = dataset.map(
        partial(_prepare_batch, prepare=prepare, report=report),
        with_indices=True,
        batched=True,
        batch_size=ROWS_AT_ONCE,
        remove_columns=dataset.column_names or list(first),
        features=column_features(with_state=False),
    )
    return prepared, report


def checked_stream(dataset: IterableDataset, check: Callable[[TokenizedGroup], None]) -> IterableDataset:
    """The same stream of token columns; `check` sees every group as it passes, and raises where it cannot be used."""
    return dataset.map(partial(_check_columns, check=check), features=column_features(with_state=False))


def _prepare_batch(
    batch: Mapping[str, list[Any]], rows: list[int], prepare: RowPreparer, report: StreamReport
) -> dict[str, list[Any]]:
    columns = prepare(batch, rows)
    for row, reason, notes, became in zip(rows, columns["bad_row"], columns["notes"], columns["columns"], strict=True):
        report.add(row, reason, [Note(**note) for note in notes or ()])
        report.add_columns(row, became)
    kept = [index for index, reason in enumerate(columns["bad_row"]) if reason is None]
    return {name: [columns[name][index] for index in kept] for name in GROUP_COLUMNS}


def _check_columns(example: dict[str, Any], check: Callable[[TokenizedGroup], None]) -> dict[str, Any]:
    check(group_from_columns(example))
    return example
