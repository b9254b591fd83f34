"""A column of a dataset as Arrow holds it, so that counting and comparing make no Python objects of its tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset


def arrow_column(dataset: Dataset, name: str) -> Any:
    """A pyarrow ChunkedArray of the rows that the dataset shows: whole where it can be, gathered for a selection."""
    table = dataset.with_format("arrow").select_columns([name])
    return table.data[name] if table._indices is None else table[:][name]
