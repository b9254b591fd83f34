"""Rows of a prepared dataset as arrays, read from its Arrow columns without creating Python objects for tokens.

In: a dataset with the columns of `fastdpo.data.prepare`. Out: its groups, the cache keys and token counts of their
sequences; and the dataset with reference log-probs in its rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdpo.references.cache import sequence_key
from fastdpo.types import TokenizedGroup

if TYPE_CHECKING:
    from datasets import Dataset

_ROWS_AT_A_TIME = 1000


@dataclass(frozen=True)
class RowInfo:
    """The facts about a row that scoring needs before it reads the row again."""

    keys: tuple[bytes, ...]  # of its K sequences
    prompt: bytes  # equal for rows of the same prompt
    num_prompt: int  # tokens
    lengths: tuple[int, ...]  # (K,) tokens of the responses
    ref_logps: tuple[float, ...] | None  # (K,) from the dataset


def row_infos(dataset: Dataset) -> list[RowInfo]:
    """One RowInfo per row, in order."""
    infos = []
    for start in range(0, len(dataset), _ROWS_AT_A_TIME):
        rows = range(start, min(start + _ROWS_AT_A_TIME, len(dataset)))
        infos += [_row_info(group) for group in read_groups(dataset, rows)]
    return infos


def read_groups(dataset: Dataset, rows: Sequence[int]) -> Iterator[TokenizedGroup]:
    """The groups of the given rows, with tokens as int32 arrays and masks as bool arrays."""
    table = dataset.with_format("arrow")[list(rows)]
    columns = {name: table[name].combine_chunks() for name in table.column_names}
    prompts = _lists(columns["prompt_ids"])
    responses = _lists_of_lists(columns["responses"])
    masks = _lists_of_lists(columns["loss_masks"])
    ref_logps = columns["ref_logps"].to_pylist()
    for row in zip(prompts, responses, masks, ref_logps, columns["preferences"].to_pylist(), strict=True):
        prompt, branches, kept, logps, pairs = row
        is_brought = logps is not None and None not in logps
        preferences = [(chosen, rejected) for chosen, rejected in pairs or ()]
        yield TokenizedGroup(prompt, branches, kept, logps if is_brought else None, preferences)


def _lists(column: Any) -> list[Any]:
    """The rows of an Arrow list array as views of one array; None for a null row."""
    values = column.flatten().to_numpy(zero_copy_only=False)
    return _split(column, values)


def _lists_of_lists(column: Any) -> list[Any]:
    return _split(column, _lists(column.flatten()))


def _split(column: Any, values: Any) -> list[Any]:
    lengths = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    ends = np.concatenate([[0], np.cumsum(lengths)]).tolist()
    is_null = column.is_null().to_numpy(zero_copy_only=False).tolist()
    return [None if null else values[ends[i] : ends[i + 1]] for i, null in enumerate(is_null)]


def _row_info(group: TokenizedGroup) -> RowInfo:
    prompt = np.asarray(group.prompt_ids)
    masks = group.loss_masks if group.loss_masks is not None else [np.ones(len(r), bool) for r in group.responses]
    unmasked = np.zeros(len(prompt), bool)
    keys = []
    for response, mask in zip(group.responses, masks, strict=True):
        is_counted = np.concatenate([unmasked, mask])
        is_counted[0] = False  # as in packing: nothing predicts the first token
        keys.append(sequence_key(np.concatenate([prompt, response]), is_counted))
    return RowInfo(
        keys=tuple(keys),
        # if truncation gave every response its own prompt, rows share no prompt
        prompt=sequence_key(prompt, unmasked) if len(prompt) else keys[0],
        num_prompt=len(prompt),
        lengths=tuple(len(response) for response in group.responses),
        ref_logps=None if group.ref_logps is None else tuple(group.ref_logps),
    )


def with_ref_logps(dataset: Dataset, ref_logps: Sequence[list[float] | None]) -> Dataset:
    """The dataset with these (K,) log-probs stored in its rows, so that shuffling keeps rows and log-probs together;
    None for a row without any."""
    from datasets import List, Value

    columns = dataset.column_names
    filled = dataset.remove_columns("ref_logps").add_column(
        "ref_logps", list(ref_logps), feature=List(Value("float64"))
    )
    return filled.select_columns(columns)
