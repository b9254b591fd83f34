"""Concatenates several datasets: each is loaded, reduced to its columns and to its share.

In: parts that `cli.options.mixtures` has checked: path (a file, a directory, a name, or a builder such as "json" with
data_files), name, split, data_dir, data_files, columns, and fraction or weight. Out: one Dataset, or one stream. If the
columns of the sets differ, each row is stored as JSON text. Single answers and trees become rows of ranked answers
before they are joined with rows of another form.
Refused with ValueError: everything that `loading` refuses, columns that a set lacks, shares of a stream.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastdpo.data.prepare import one_prompt_a_row
from fastdpo.data.sources.loading import ROW_JSON, load_preference_dataset, raw_example, stream_preference_dataset

_SLICED = re.compile(r"[\[+]")  # train[:10%], train+test: as in datasets.load_dataset
_PIECE = re.compile(r"(?P<name>[^\[\]]+)(\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")


def load_mixture(
    parts: Sequence[Mapping[str, Any]],
    *,
    streaming: bool = False,
    dataset_format: str = "auto",
    is_sft: bool = False,
) -> Any:
    """Loads and concatenates the sets.

    Args:
        parts: see above. fraction (TRL): the set's share of the mixture, which is as large as possible without using a
            row twice; the first rows of each set are kept. weight (alignment-handbook): the share of the set's own
            rows, drawn with the part's seed (default 0).
    Raises:
        ValueError: see above.
    """
    from datasets import concatenate_datasets

    if streaming:
        shares = [key for part in parts for key in ("fraction", "weight") if part.get(key) not in (None, 1)]
        if shares:
            raise ValueError(f"{shares[0]} must not be given for streamed data, whose size is unknown")
        return _concatenated([_load(part, streaming=True) for part in parts])
    sets = [one_prompt_a_row(_load(part), dataset_format, is_sft=is_sft) for part in parts]
    fractions = [part.get("fraction") for part in parts]
    if None not in fractions:
        sets = [dataset.select(range(size)) for dataset, size in zip(sets, _sizes(sets, fractions), strict=True)]
    sets = [_weighed(dataset, part) for dataset, part in zip(sets, parts, strict=True)]
    kept = [dataset for dataset in sets if len(dataset) > 0]
    if not kept:
        raise ValueError(f"datasets must keep at least one row, got {[len(dataset) for dataset in sets]} rows")
    return concatenate_datasets(_alike(kept)) if len(kept) > 1 else kept[0]


def _sizes(sets: Sequence[Any], fractions: Sequence[Any]) -> list[int]:
    """Number of rows taken from each set. Sets of 100 and 30 rows with fractions 1 and 1 give 30 and 30."""
    shares = [fraction / sum(fractions) for fraction in fractions]
    total = min(len(dataset) / share for dataset, share in zip(sets, shares, strict=True) if share > 0)
    return [round(share * total) for share in shares]


def _weighed(dataset: Any, part: Mapping[str, Any]) -> Any:
    weight = part.get("weight")
    if weight is None or weight == 1:
        return dataset
    return dataset.shuffle(seed=int(part.get("seed", 0))).select(range(int(len(dataset) * weight)))


def _load(part: Mapping[str, Any], *, streaming: bool = False) -> Any:
    path, split, name = str(part["path"]), str(part.get("split", "train")), part.get("name")
    if part.get("data_files") is not None or part.get("data_dir") is not None:
        loaded = _built(part, split, streaming)
    elif _SLICED.search(split) and Path(path).expanduser().exists():
        loaded = _sliced(path, split, name, streaming)
    else:
        loaded = (stream_preference_dataset if streaming else load_preference_dataset)(path, split, name)
    return loaded if part.get("columns") is None else _with_columns(loaded, list(part["columns"]), path)


def _built(part: Mapping[str, Any], split: str, streaming: bool) -> Any:
    """Calls `datasets.load_dataset`, as TRL does: path is a builder (json, parquet, csv), a directory or a name."""
    from datasets import load_dataset

    settings = {key: part[key] for key in ("data_dir", "data_files") if part.get(key) is not None}
    try:
        return load_dataset(part["path"], part.get("name"), split=split, streaming=streaming, **settings)
    except (OSError, ValueError, RuntimeError) as error:  # datasets' own are subclasses
        cause = f"{error}" if error.__cause__ is None else f"{error}: {error.__cause__}"
        raise ValueError(
            f"dataset {part['path']!r} with {settings} and split {split!r} cannot be read: {cause}"
        ) from None


def _sliced(path: str, split: str, name: str | None, streaming: bool) -> Any:
    """Parts of splits of a local path, such as `train[:100]`, `train[:10%]+test`; as in Python, an end may exceed the
    number of rows."""
    from datasets import concatenate_datasets

    if streaming:
        raise ValueError(f"split must be the plain name of one split for streamed data, got {split!r}")
    pieces = []
    for text in split.split("+"):
        found = _PIECE.fullmatch(text.strip())
        if found is None:
            raise ValueError(f"split must look like train[:100], train[:10%] or train+test, got {split!r}")
        dataset = load_preference_dataset(path, found["name"], name)
        start, stop = (_row(found[end], len(dataset)) for end in ("start", "stop"))
        pieces.append(dataset.select(range(*slice(start, stop).indices(len(dataset)))))
    return concatenate_datasets(pieces)


def _row(bound: str | None, num_rows: int) -> int | None:
    """Row index of a slice bound: with 100 rows, -20 gives -20 and 75% gives 75, rounded to the nearest row."""
    if not bound:
        return None
    return round(int(bound[:-1]) * num_rows / 100) if bound.endswith("%") else int(bound)


def _with_columns(dataset: Any, columns: list[str], path: str) -> Any:
    """The dataset with only these columns, also if its rows are stored as JSON."""
    if dataset.column_names == [ROW_JSON]:
        return dataset.map(_picked, fn_kwargs={"columns": columns, "path": path})
    there = dataset.column_names
    missing = [column for column in columns if there is not None and column not in there]
    if missing:
        raise ValueError(f"columns must be among {there} of {path}, got {missing[0]!r}")
    return dataset.select_columns(columns)


def _picked(example: Mapping[str, Any], columns: list[str], path: str) -> dict[str, str]:
    row = raw_example(example)
    if not any(column in row for column in columns):
        raise ValueError(f"columns must be among {sorted(row)} of {path}, got {columns}")
    return {ROW_JSON: json.dumps({column: row[column] for column in columns if column in row})}


def _alike(sets: Sequence[Any]) -> list[Any]:
    """The sets with equal columns: their own if all sets have the same, else each row as JSON text."""
    if all(dataset.features == sets[0].features for dataset in sets):
        return list(sets)
    return [_as_json(dataset) for dataset in sets]


def _as_json(dataset: Any) -> Any:
    return (
        dataset if dataset.column_names == [ROW_JSON] else dataset.map(_row_json, remove_columns=dataset.column_names)
    )


def _row_json(example: Mapping[str, Any]) -> dict[str, str]:
    return {ROW_JSON: json.dumps(dict(example), default=str)}


def _concatenated(streams: Sequence[Any]) -> Any:
    """Concatenated streams, each row as JSON text if their columns differ or are unknown."""
    from datasets import concatenate_datasets

    features = [stream.features for stream in streams]
    if None in features or any(feature != features[0] for feature in features):
        streams = [_stream_as_json(stream) for stream in streams]
    return concatenate_datasets(list(streams)) if len(streams) > 1 else streams[0]


def _stream_as_json(stream: Any) -> Any:
    from datasets import Features, Value

    names = stream.column_names or list(next(iter(stream), {}))
    if names == [ROW_JSON]:
        return stream.cast(Features({ROW_JSON: Value("string")})) if stream.features is None else stream
    return stream.map(_row_json, remove_columns=names, features=Features({ROW_JSON: Value("string")}))
