"""Reads a column of a dataset as Arrow data, so that counting and comparing tokens create no Python objects; and
removes the None values that Arrow adds to rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset


def arrow_column(dataset: Dataset, name: str) -> Any:
    """A pyarrow ChunkedArray of the dataset's visible rows: the whole column if possible, gathered for a selection."""
    table = dataset.with_format("arrow").select_columns([name])
    return table.data[name] if table._indices is None else table[:][name]


def without_fill_ins(value: Any, feature: Any) -> Any:
    """A cell without the None values that Arrow adds for keys that only structs of other rows have.

    A key that is None in every row was written by the user and stays; Arrow does not change a `Json` feature.

    Args:
        feature: feature of the column from `Dataset.features`; None if it is unknown.
    """
    if type(feature).__name__ == "Json":
        return value
    if isinstance(value, Mapping):
        kinds = feature if isinstance(feature, Mapping) else {}
        return {
            key: without_fill_ins(item, kinds.get(key))
            for key, item in value.items()
            if item is not None or getattr(kinds.get(key), "dtype", None) == "null"
        }
    if isinstance(value, list):
        kind = feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", None)
        return [without_fill_ins(item, kind) for item in value]
    return value


def features_of_fill_ins(dataset: Dataset) -> Any:
    """The features of a dataset in which Arrow may have added None values; None if no struct holds a null, so that its
    rows are unchanged."""
    return dataset.features if _holds_null(_all_structs(dataset)) else None


def holds_as_given(dataset: Dataset, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the columns return exactly the rows that they were made from.

    Structs change if one of them lacks a key of the others or holds None (both read as None afterwards), if 1 occurs
    beside 2.5 (it becomes 1.0), or if the order of keys differs. Plain messages are not compared one by one.
    """
    structs = list(_all_structs(dataset))
    if _holds_null(structs):
        return False
    if all(_is_plain(field.type) for struct in structs for field in struct.type):
        return True
    return all(
        json.dumps(ours, default=str) == json.dumps(given, default=str)
        for ours, given in zip(dataset, rows, strict=True)
    )


def _all_structs(dataset: Dataset) -> Iterator[Any]:
    columns = (dataset.data.column(name) for name in dataset.column_names)
    return (struct for column in columns for chunk in column.chunks for struct in _structs(chunk))


def _holds_null(structs: Iterable[Any]) -> bool:
    return any(child.null_count > struct.null_count for struct in structs for child in struct.flatten())


def _structs(array: Any) -> Iterator[Any]:
    """Every struct array in an Arrow array, nested ones included."""
    import pyarrow as pa

    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        yield from _structs(array.flatten())
    elif pa.types.is_struct(array.type):
        yield array
        for child in array.flatten():
            yield from _structs(child)


def _is_plain(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_string(kind) or pa.types.is_boolean(kind)
