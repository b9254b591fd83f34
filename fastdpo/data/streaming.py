"""From a stream of examples (`datasets.IterableDataset`) to a stream of token columns, tokenized while it is read.

In: as in `prepare`. Out: the same columns in the order of the stream, without unusable rows; the reading process counts
these and logs the first of each kind. Nothing is cached: each epoch tokenizes again.
Refused with ValueError: everything that `rows` refuses (the first row is checked at once), and formats that have to be
read as a whole because their rows are single answers or trees.
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
    """The stream with GROUP_COLUMNS, and a report that grows while this process reads the stream.

    Raises:
        ValueError: the stream is empty, or its first row has no known format.
    """
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError("dataset must hold at least one row, got an empty stream")
    if regrouped((), raw_example(first, dataset.features or {}), settings.dataset_format, is_sft=is_sft) is not None:
        raise ValueError(
            "dataset must not be a stream if its rows are single answers or trees, which are grouped by prompt:"
            " load it without streaming=True"
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
    """The same stream of token columns; `check` gets every group and raises if the group cannot be used."""
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
