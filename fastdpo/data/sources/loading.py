"""From a path or the name of a dataset to a `datasets.Dataset` of raw examples, or to a stream of them.

In: JSON (an array, or one object per line) or JSON Lines, each also gzipped; Parquet; a directory of such files or one
saved by `Dataset.save_to_disk`; else a name for `datasets.load_dataset`. Out: one unchanged row per example.
JSON is parsed here, so that errors name the line and rows in one file may differ in shape. A stream reads JSON Lines
line by line, and an array of objects at once.
Refused with ValueError: a missing, malformed or empty file.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdpo.data.depth import MOST_LEVELS, is_too_deep
from fastdpo.data.sources.arrow import holds_as_given, without_fill_ins

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson", ".json.gz", ".jsonl.gz", ".ndjson.gz")
SUFFIXES = (*JSON_SUFFIXES, ".parquet")
OTHER_SPLITS = ("test", "valid", "validation", "val", "eval", "evaluation", "dev")
_ARROW_LEVELS = 12  # above, rows are stored as JSON: datasets takes twice as long for each level of a list
ROW_JSON = "row_json"  # the only column of a dataset whose rows do not fit into common columns: each row as JSON text


def stream_preference_dataset(
    path_or_name: str | Path, split: str = "train", config_name: str | None = None
) -> IterableDataset:
    """Like `load_preference_dataset`, but a stream in the order of the files: a faulty row raises when it is read.

    Raises:
        ValueError: the path or dataset does not exist.
    """
    from datasets import Dataset, IterableDataset, load_dataset

    path = Path(path_or_name).expanduser()
    found = _local_files(path, split, path_or_name)
    if found is None:
        return _load_published(str(path_or_name), split, config_name, streaming=True)
    _check_no_config(config_name, path)
    if isinstance(found, Dataset):
        return found.to_iterable_dataset()
    if _are_parquet(found):
        return load_dataset("parquet", data_files=[str(file) for file in found], split="train", streaming=True)
    return IterableDataset.from_generator(_stream_json, gen_kwargs={"paths": found})


def load_preference_dataset(path_or_name: str | Path, split: str = "train", config_name: str | None = None) -> Dataset:
    """The raw examples of a file, a directory or a published dataset; the file forms are in the module's docstring.

    Args:
        path_or_name: a local path, or a name that `datasets.load_dataset` knows.
        split: split of a directory or a published dataset; a single file has one split, for any name.
        config_name: configuration ("subset" on the Hub) of a published dataset with several configurations.
    Raises:
        ValueError: the path or dataset does not exist, a line is malformed, the file is empty or holds values other
            than objects, or `config_name` is given for a local path.
    """
    from datasets import Dataset

    path = Path(path_or_name).expanduser()
    found = _local_files(path, split, path_or_name)
    if found is None:
        return _load_published(str(path_or_name), split, config_name)
    _check_no_config(config_name, path)
    return found if isinstance(found, Dataset) else _load_files(found)


def iterate_examples(
    path_or_name: str | Path, split: str = "train", config_name: str | None = None
) -> Iterator[Mapping[str, Any]]:
    """The raw examples of `load_preference_dataset` as they stand in the file, one at a time: lines of JSON are parsed
    as they are read and never held together.

    Raises: as `load_preference_dataset`, for a malformed line when it is reached.
    """
    path = Path(path_or_name).expanduser()
    found = _local_files(path, split, path_or_name)
    if isinstance(found, list) and not _are_parquet(found):
        _check_no_config(config_name, path)
        rows = _json_objects(found)
        first = next(rows, None)
        if first is None:
            raise ValueError(f"dataset file must hold at least one row: {path}")
        yield first
        yield from rows
        return
    dataset = load_preference_dataset(path_or_name, split, config_name)
    yield from (raw_example(example, dataset.features) for example in dataset)


def dataset_from_rows(rows: Sequence[Mapping[str, Any]]) -> Dataset:
    """A Dataset of `rows`. If common columns would change the rows (different keys or types, objects that lack a key or
    hold null), the dataset has one column of JSON text instead."""
    from datasets import Dataset

    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(f"dataset rows must be dicts, got {_shown(row)} as row {number}")
    if not rows:
        return Dataset.from_dict({})
    names = list(rows[0])
    dataset = None
    if all(row.keys() == rows[0].keys() and not is_too_deep(row, _ARROW_LEVELS) for row in rows):
        try:
            dataset = Dataset.from_dict({name: [row[name] for row in rows] for name in names})
        except (ValueError, TypeError, OverflowError):  # Arrow's own are subclasses
            pass
        else:
            if holds_as_given(dataset, rows):
                return dataset
    try:
        return Dataset.from_dict({ROW_JSON: [json.dumps(row) for row in rows]})
    except RecursionError:
        raise ValueError(
            f"dataset rows must not be nested more than {MOST_LEVELS} levels deep, got one that is"
        ) from None
    except TypeError as error:  # dates and the like, which JSON does not have
        if dataset is not None:
            return dataset
        raise ValueError(
            f"dataset rows must hold JSON values only, or all have equal keys and types ({error})"
        ) from None


def raw_example(example: Mapping[str, Any], features: Any = None) -> Mapping[str, Any]:
    """The example as in the file, also if `dataset_from_rows` stored it as JSON text.

    Args:
        features: features of a dataset read from Arrow; the None values that Arrow added are removed.
    """
    if list(example) == [ROW_JSON]:
        return json.loads(example[ROW_JSON])
    if features is None:
        return example
    return {name: without_fill_ins(value, features.get(name)) for name, value in example.items()}


def read_json_rows(path: str | Path) -> list[dict[str, Any]]:
    """The objects of one JSON or JSON Lines file, gzipped if its name ends in .gz.

    Raises:
        ValueError: malformed JSON (with the line, counted from 1), an empty file, or a value that is not an object.
    """
    text = _read_text(Path(path))
    if not text.strip():
        raise ValueError(f"dataset file must not be empty: {path}")
    rows = _read_array(text, path) if text.lstrip().startswith("[") else _read_lines(text, path)
    if not rows:
        raise ValueError(f"dataset file must hold at least one row: {path}")
    return rows


def _stream_json(paths: Sequence[Path]) -> Iterator[dict[str, str]]:
    """Each object as JSON text; see `raw_example`."""
    for row in _json_objects(paths):
        yield {ROW_JSON: json.dumps(row)}


def _json_objects(paths: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """The objects of the files, of JSON Lines one at a time."""
    for path in paths:
        try:
            with _open_text(path) as lines:
                is_array = next((line for line in lines if line.strip()), "").lstrip().startswith("[")
            if is_array:
                yield from read_json_rows(path)
                continue
            with _open_text(path) as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield _object_of(line, path, number)
        except (gzip.BadGzipFile, EOFError, zlib.error, UnicodeDecodeError) as error:
            raise ValueError(f"dataset file cannot be read: {path} ({error})") from None


def _open_text(path: Path) -> Any:
    opened = gzip.open if path.name.lower().endswith(".gz") else open
    return opened(path, "rt", encoding="utf-8-sig", newline="\n")


def _object_of(line: str, path: str | Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"malformed JSON in {path}, line {number}, column {error.colno}: {error.msg}") from None
    except (RecursionError, ValueError) as error:  # ValueError: an integer of thousands of digits
        raise ValueError(f"JSON in {path}, line {number}, cannot be read: {_why(error)}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{path} must hold one object per line, got {_shown(line)} in line {number}")
    return row


def _read_text(path: Path) -> str:
    try:
        data = gzip.decompress(path.read_bytes()) if path.name.lower().endswith(".gz") else path.read_bytes()
        return data.decode("utf-8-sig")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"dataset file is not a whole gzip file: {path} ({error})") from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"dataset file must be UTF-8: {path}, line {line} ({error.reason})") from None
    except OSError as error:
        raise ValueError(f"dataset file cannot be read: {path} ({error.strerror})") from None


def _read_array(text: str, path: str | Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"malformed JSON in {path}, line {error.lineno}, column {error.colno}: {error.msg}") from None
    except (RecursionError, ValueError) as error:
        raise ValueError(f"JSON in {path} cannot be read: {_why(error)}") from None
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{path} must hold a list of objects, got {_shown(row)} as element {number}")
    return rows


def _read_lines(text: str, path: str | Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: a string may contain U+2028
        if not line.strip():
            continue
        try:
            rows.append(_object_of(line, path, number))
        except ValueError:
            if "\n" in text.strip() and _is_json(text):
                raise ValueError(
                    f"{path} must hold a list of objects or one object per line, got {_shown(text)}"
                ) from None
            raise
    return rows


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (RecursionError, ValueError):
        return False
    return True


def _why(error: Exception) -> str:
    return "lists or objects are nested too deeply" if isinstance(error, RecursionError) else str(error)


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else text[:60] + "..."


def _local_files(path: Path, split: str, given: str | Path) -> list[Path] | Dataset | None:
    """The files of a path, or the dataset saved there; None for a name that is not a path."""
    if path.is_dir():
        return _directory_files(path, split)
    if path.exists():
        return _checked_suffixes([path])
    if path.name.lower().endswith(SUFFIXES) or str(given).startswith((".", "/", "~")):
        raise ValueError(f"dataset file does not exist: {given}")
    return None


def _are_parquet(paths: Sequence[Path]) -> bool:
    return all(path.name.lower().endswith(".parquet") for path in paths)


def _checked_suffixes(paths: list[Path]) -> list[Path]:
    for path in paths:
        if not (_are_parquet(paths) or path.name.lower().endswith(JSON_SUFFIXES)):
            raise ValueError(f"dataset files must all be JSON or all Parquet ({', '.join(SUFFIXES)}), got {path}")
    return paths


def _load_files(paths: Sequence[Path]) -> Dataset:
    from datasets import Dataset

    if _are_parquet(paths):
        try:
            dataset = Dataset.from_parquet([str(path) for path in paths])
        except Exception as error:  # pyarrow's and datasets' own, wrapped in one another
            raise ValueError(
                f"dataset file is not readable as Parquet: {paths[0]} ({error.__cause__ or error})"
            ) from None
        if len(dataset) == 0:
            raise ValueError(f"dataset file must hold at least one row: {paths[0]}")
        return dataset
    return dataset_from_rows([row for path in paths for row in read_json_rows(path)])


def _directory_files(path: Path, split: str) -> list[Path] | Dataset:
    from datasets import DatasetDict, load_from_disk

    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        _check_stored_names(path)
        dataset = load_from_disk(str(path))
        if not isinstance(dataset, DatasetDict):
            return dataset
        if split not in dataset:
            raise ValueError(f"split must be one of {sorted(dataset)} in {path}, got {split!r}")
        return dataset[split]
    files = sorted(file for file in path.rglob("*") if file.name.lower().endswith(SUFFIXES))
    parts_of = {file: file.relative_to(path).parts for file in files}
    # train.jsonl, train-00000-of-00002.parquet, but not train_sft-...
    exact = rf"{re.escape(split)}([-.]\d.*|(\.\w+)*)"
    of_split = [file for file in files if any(re.fullmatch(exact, part) for part in parts_of[file])]
    if not of_split:
        word = _word(split)
        of_split = [file for file in files if any(word.search(part) for part in parts_of[file])]
    if not of_split and split == "train":
        others = [_word(other) for other in OTHER_SPLITS]
        of_split = [file for file in files if not any(other.search(file.name) for other in others)]
    if not of_split:
        found = ", ".join(file.name for file in files) or "none"
        raise ValueError(
            f"{path} must hold files of the split {split!r} ending in {', '.join(SUFFIXES)}, found: {found}"
        )
    return _checked_suffixes(of_split)


def _check_stored_names(path: Path) -> None:
    """Refuses a saved dataset that names files outside of its folder.

    Raises:
        ValueError: see above, or a file is no JSON.
    """
    for file in (path / "dataset_dict.json", path / "state.json", *path.glob("*/state.json")):
        try:
            stored = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
            names = [*stored.get("splits", ()), *(part["filename"] for part in stored.get("_data_files", ()))]
        except (ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{file} must be as Dataset.save_to_disk writes it, got another file ({error})") from None
        for name in names:
            if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name:
                raise ValueError(f"{file} must name files in its own folder, got {name!r}")


def _word(name: str) -> re.Pattern[str]:
    """Matches `name` without a letter before or after it: "test" in "my-test_1.json", but not in "latest.json"."""
    return re.compile(rf"(?<![a-z]){re.escape(name)}(?![a-z])", re.IGNORECASE)


def _check_no_config(config_name: str | None, path: Path) -> None:
    if config_name is not None:
        raise ValueError(f"dataset_config must be None for a local path, got {config_name!r} for {path}")


def _load_published(name: str, split: str, config_name: str | None, *, streaming: bool = False) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(name, config_name, split=split, streaming=streaming)
    except (FileNotFoundError, ConnectionError, ValueError) as error:  # ValueError: no such configuration or split
        raise ValueError(
            f"dataset must be a local path or the name of a dataset on the Hub, got {name!r} with"
            f" dataset_config {config_name!r} and split {split!r}: {error}"
        ) from error
