"""From a dataset of examples to a dataset of token columns and a report.

In: a `datasets.Dataset`, a list of dicts, or a `datasets.IterableDataset`, of any format in `formats`, or already
tokenized (`fastdpo.data.rows.columns`). Out: the columns of a `TokenizedGroup` for every usable row;
`group_from_columns` turns them back into a group. The tokens of a Dataset are stored in datasets' cache, so later runs
with the same rows, tokenizer and settings reuse them; a stream is tokenized while it is read.
Refused with ValueError: everything that `formats` refuses, a wrong kind of tokenizer, a dataset without a usable row.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdpo.data.forms.columns import ColumnLedger
from fastdpo.data.forms.formats import regrouped
from fastdpo.data.rows.columns import GROUP_COLUMNS, STATE_COLUMNS, RowPreparer, column_features, group_from_columns
from fastdpo.data.rows.first_row import first_row
from fastdpo.data.rows.report import DataReport, Report, TokenStats
from fastdpo.data.sources.arrow import arrow_column, features_of_fill_ins
from fastdpo.data.sources.cache import cache_file, tokens_fingerprint
from fastdpo.data.sources.loading import dataset_from_rows, raw_example
from fastdpo.data.streaming import prepare_stream
from fastdpo.data.tokens.notes import note_counts
from fastdpo.data.tokens.tokenization import TokenizationSettings
from fastdpo.files import naming

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

__all__ = ["Report", "group_from_columns", "one_prompt_a_row", "prepare_preference_dataset", "prepare_sft_dataset"]

ROWS_AT_ONCE = 256  # rendered, tokenized and written together
MEDIA_FEATURES = ("Image(", "Video(", "Audio(")  # refused before a row is read, which would decode them


def prepare_preference_dataset(
    dataset: Dataset | IterableDataset | Sequence[Mapping[str, Any]],
    tokenizer: Any,
    settings: TokenizationSettings,
    *,
    num_proc: int | None = None,
    desc: str | None = None,
) -> tuple[Dataset | IterableDataset, Report]:
    """Tokenize preferences.

    Args:
        dataset: raw or tokenized examples.
        tokenizer: a transformers tokenizer, with a chat template if rows are conversational.
        num_proc: processes for `Dataset.map`; None uses the current one. A stream uses its data loader's workers.
        desc: label of the progress bar.
    Returns:
        The dataset with GROUP_COLUMNS (None if a row has no loss_masks or ref_logps), one row per usable example in
        the given order, and the report; the report of a stream grows while the stream is read.
    Raises:
        ValueError: no row is usable, a row is bad and `settings.on_bad_row` is "raise", or `formats` refuses a row.
    """
    return _prepare(dataset, tokenizer, settings, is_sft=False, num_proc=num_proc, desc=desc)


def prepare_sft_dataset(
    dataset: Dataset | IterableDataset | Sequence[Mapping[str, Any]],
    tokenizer: Any,
    settings: TokenizationSettings,
    *,
    num_proc: int | None = None,
    desc: str | None = None,
) -> tuple[Dataset | IterableDataset, Report]:
    """As `prepare_preference_dataset` for supervised fine-tuning: one response per row, no preference."""
    return _prepare(dataset, tokenizer, settings, is_sft=True, num_proc=num_proc, desc=desc)


def _prepare(
    dataset: Any,
    tokenizer: Any,
    settings: TokenizationSettings,
    *,
    is_sft: bool,
    num_proc: int | None,
    desc: str | None,
) -> tuple[Any, Report]:
    from datasets import IterableDataset
    from transformers.utils import logging

    if hasattr(tokenizer, "image_processor") or not callable(tokenizer):
        raise ValueError(f"tokenizer must be a text tokenizer, got {type(tokenizer).__name__}")
    if isinstance(dataset, IterableDataset):
        _refuse_media(dataset)
        return prepare_stream(dataset.with_format(None), tokenizer, settings, is_sft=is_sft)
    dataset = one_prompt_a_row(_checked_dataset(dataset), settings.dataset_format, is_sft=is_sft)
    fingerprint = tokens_fingerprint(dataset, tokenizer, settings=settings, is_sft=is_sft)
    file = cache_file(dataset, fingerprint)
    beside = [file, *(of["filename"] for of in dataset.cache_files)]  # the folder that `map` writes to
    place = next((Path(each).parent for each in beside if each is not None), None)
    with nullcontext() if place is None else naming(place):
        prepared = dataset.map(
            RowPreparer(tokenizer, settings, is_sft, features_of_fill_ins(dataset)),
            with_indices=True,
            batched=True,
            batch_size=ROWS_AT_ONCE,
            remove_columns=dataset.column_names,
            features=column_features(),
            num_proc=num_proc,
            desc=desc or "Tokenizing",
            new_fingerprint=fingerprint,
            cache_file_name=file,
        )
    prepared = prepared.with_format(None)  # a transform of the raw rows stays with them in `map`
    report = _report(prepared.select_columns(list(STATE_COLUMNS)), "examples" if is_sft else "pairs")
    report = replace(report, first_row=first_row(dataset, settings, is_sft=is_sft))
    if report.num_kept == 0:
        raise ValueError("dataset must hold at least one usable row: " + " ".join(report.lines()))
    for line in report.warnings():
        logging.get_logger(__name__).warning(line)
    if report.num_kept < report.num_rows:
        dropped = {row for rows in report.dropped.values() for row in rows}
        prepared = prepared.select([row for row in range(len(prepared)) if row not in dropped])
    return prepared.select_columns(list(GROUP_COLUMNS)), report


def _checked_dataset(dataset: Any) -> Dataset:
    """The dataset as a `Dataset`, checked to have rows and no columns of images, video or audio."""
    from datasets import Dataset

    if isinstance(dataset, (list, tuple)):
        dataset = dataset_from_rows(dataset)
    if not isinstance(dataset, Dataset):
        raise ValueError(
            "dataset must be a datasets.Dataset (one split), a datasets.IterableDataset or a list of dicts, got"
            f" {type(dataset).__name__}"
        )
    _refuse_media(dataset)
    if len(dataset) == 0:
        raise ValueError("dataset must hold at least one row, got none")
    has_values_of_python = dataset.format["type"] in (None, "custom")  # custom: a transform, which makes the rows
    return dataset if has_values_of_python else dataset.with_format(None)


def _refuse_media(dataset: Dataset | IterableDataset) -> None:
    features = dataset.features or {}
    media = [name for name, kind in features.items() if any(word in repr(kind) for word in MEDIA_FEATURES)]
    if media:
        raise ValueError(f"dataset must hold text only, got the columns {media}; vision and audio are not supported")


def one_prompt_a_row(dataset: Dataset, dataset_format: str, *, is_sft: bool) -> Dataset:
    """Regroups trees and single answers into rows of ranked answers; any other dataset is returned unchanged.

    Call this before splitting a dataset; otherwise the answers to one prompt may end up in different parts.

    Raises:
        ValueError: there are no ranked answers.
    """
    examples = (raw_example(example, dataset.features) for example in dataset)
    rows = regrouped(examples, raw_example(dataset[0], dataset.features), dataset_format, is_sft=is_sft)
    if rows is None:
        return dataset
    try:
        grouped = list(rows)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            "dataset rows must all have the form of the first one, because answers are grouped by prompt, got another"
            f" form ({type(error).__name__}: {error})"
        ) from error
    if not grouped:
        raise ValueError(f"dataset must hold at least one prompt with ranked answers, got none in {len(dataset)} rows")
    return dataset_from_rows(grouped)


def _report(states: Dataset, kind: str) -> DataReport:
    import pyarrow.compute as pc

    columns = {name: arrow_column(states, name) for name in STATE_COLUMNS}
    dropped: dict[str, list[int]] = defaultdict(list)
    for row in pc.indices_nonzero(columns["bad_row"].is_valid()).to_pylist():
        dropped[columns["bad_row"][row].as_py()].append(row)
    prompts = columns["num_prompt_tokens"].drop_null()
    rejected = pc.list_flatten(columns["num_rejected_tokens"])
    names = ("chosen", "rejected") if kind == "pairs" else ("response",)
    lengths = {"prompt": prompts}
    for name, side in zip(names, ("chosen", "rejected"), strict=False):
        lengths[name] = pc.list_flatten(columns[f"num_{side}_tokens"])

    def count(name: str) -> int:
        return int(pc.sum(columns[name], min_count=0).as_py())

    became = ColumnLedger()
    for value in pc.unique(columns["columns"].drop_null()).to_pylist():
        became.add(value, lambda text: pc.index(columns["columns"], text).as_py())
    return DataReport(
        kind=kind,
        num_rows=len(states),
        num_kept=len(prompts),
        num_pairs=len(rejected) if kind == "pairs" else len(prompts),
        dropped={reason: tuple(rows) for reason, rows in dropped.items()},
        num_truncated=count("is_truncated"),
        num_one_cut=count("has_one_cut"),
        num_stale_ref_logps=count("has_stale_ref_logps"),
        num_merged_boundary=count("is_merged"),
        num_transcripts=count("is_transcript"),
        unread=became.unread,
        notes=note_counts(states.select_columns(["notes"])),
        tokens={name: TokenStats.of(column.to_pylist()) for name, column in lengths.items() if len(column)},
    )
