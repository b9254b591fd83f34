"""Pairwise comparisons of models, made by people or judges, from a file or rows.

In: rows with `model_a`, `model_b` and `winner`, in JSON, JSON Lines (also gzipped), CSV, Parquet, a directory of those
or a published dataset. The winner is model_a, model_b, one of Arena's words for a tie, or the name of one of the two
models. It can also be given by the three columns winner_model_a, winner_model_b and winner_tie. Optional columns hold
the prompt (`prompt_id`, `question_id`, `prompt`, ...) and the lengths of the responses. Out: `Comparisons`, with the
number of left-out rows by reason. Refused with ValueError: missing columns, and a file without any usable row.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdpo.data.forms.names import plain_name
from fastdpo.data.forms.winners import FIRST, SECOND, TIES

CLUSTERS = ("prompt_id", "question_id", "prompt", "question", "instruction")  # the first existing column is used
CSV_SUFFIXES = (".csv", ".tsv")
MODELS = ("model_a", "model_b")
WINNER = "winner"
FLAGS = ("winner_model_a", "winner_model_b", "winner_tie")
# columns of two lengths, or of two texts or conversations whose characters are counted
LENGTHS = (("length_a", "length_b"), ("tokens_a", "tokens_b"), ("num_tokens_a", "num_tokens_b"))
TEXTS = (("response_a", "response_b"), ("answer_a", "answer_b"), ("conversation_a", "conversation_b"))
_ARENA = ("sum_assistant_a_tokens", "sum_assistant_b_tokens")  # in `conv_metadata`
_OUTCOMES = {1: 1.0, 2: 0.0, 1.5: 0.5, 0: 0.5}  # of a winner that is a number
_VERDICT = re.compile(r"[\s\[]*A\s*(>+|=+|<+)\s*B[\s\]]*", re.IGNORECASE)  # Arena-Hard's judge: [[A>>B]], [[A=B]], ...
_MIRRORED = str.maketrans("ABab", "BABA")
_SIDE = re.compile(r"((model|response|answer|output|assistant|side|option|candidate|conversation)_?)?([a-z0-9]+)")


@dataclass(frozen=True)
class Comparisons:
    """N comparisons of K models."""

    models: tuple[str, ...]  # (K,)
    first: NDArray[np.int64]  # (N,) number of the model
    second: NDArray[np.int64]  # (N,)
    outcomes: NDArray[np.float64]  # (N,) 1 if the first model won, 0 if the second one did, 0.5 for a tie
    clusters: NDArray[np.int64] | None = None  # (N,) number of the prompt; None: all comparisons are independent
    lengths: NDArray[np.float64] | None = None  # (N, 2) of the responses, in tokens or characters
    left_out: dict[str, int] = field(default_factory=dict)  # reason -> rows that could not be read

    def __post_init__(self) -> None:
        num_models, num_rows = len(self.models), len(self.outcomes)
        for name in ("first", "second"):
            numbers = getattr(self, name)
            if numbers.shape != (num_rows,) or (num_rows and not 0 <= numbers.min() <= numbers.max() < num_models):
                raise ValueError(f"{name} must hold {num_rows} numbers from 0 to {num_models - 1}, got {numbers}")
        if not np.isin(self.outcomes, (0, 0.5, 1)).all():
            raise ValueError(f"outcomes must be 1, 0 or 0.5 (a tie), got {np.unique(self.outcomes).tolist()}")
        if (self.first == self.second).any():
            raise ValueError("first and second must differ, got a model compared with itself")

    def counts(self) -> NDArray[np.int64]:
        """(K, 3): wins, ties and losses of each model."""
        results = ((1.0, 0.0), (0.5, 0.5), (0.0, 1.0))  # for the first model, and for the second one
        counts = [
            np.bincount(self.first[self.outcomes == of_first], minlength=len(self.models))
            + np.bincount(self.second[self.outcomes == of_second], minlength=len(self.models))
            for of_first, of_second in results
        ]
        return np.stack(counts, axis=1)

    def points(self) -> NDArray[np.float64]:
        """(K, K): the points of model i in its comparisons with model j, 1 for a win and 0.5 for a tie."""
        num_models = len(self.models)
        points = np.zeros((num_models, num_models))
        np.add.at(points, (self.first, self.second), self.outcomes)
        np.add.at(points, (self.second, self.first), 1 - self.outcomes)
        return points

    def without(self, models: Sequence[str]) -> Comparisons:
        """The comparisons without these models.

        Raises:
            ValueError: one of them is in no comparison.
        """
        unknown = [model for model in models if model not in self.models]
        if unknown:
            raise ValueError(f"exclude must name models in {list(self.models)}, got {unknown[0]!r}")
        stays = np.array([model not in models for model in self.models], bool)
        rows = stays[self.first] & stays[self.second]
        number = np.cumsum(stays) - 1
        return Comparisons(
            tuple(model for model in self.models if model not in models),
            number[self.first[rows]],
            number[self.second[rows]],
            self.outcomes[rows],
            None if self.clusters is None else self.clusters[rows],
            None if self.lengths is None else self.lengths[rows],
            self.left_out,
        )


def read_comparisons(
    path_or_name: str | Path,
    *,
    split: str = "train",
    config_name: str | None = None,
    cluster: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> Comparisons:
    """The comparisons of a file, a directory or a published dataset. `comparisons_of` describes the arguments.

    Raises:
        ValueError: the path does not exist, a line is malformed, or `comparisons_of` refuses the rows.
    """
    from fastdpo.data.sources.loading import JSON_SUFFIXES, load_preference_dataset, raw_example, read_json_rows

    path = Path(path_or_name).expanduser()
    name = path.name.lower()
    if name.endswith(CSV_SUFFIXES):
        return comparisons_of(_read_csv(path), cluster=cluster, columns=columns, source=str(path_or_name))
    if path.is_file() and name.endswith(JSON_SUFFIXES):
        return comparisons_of(read_json_rows(path), cluster=cluster, columns=columns, source=str(path_or_name))
    dataset = load_preference_dataset(path_or_name, split, config_name)
    rows = (raw_example(example, dataset.features) for example in dataset)
    return comparisons_of(rows, cluster=cluster, columns=columns, source=str(path_or_name))


def comparisons_of(
    rows: Iterable[Mapping[str, Any]],
    *,
    cluster: str | None = None,
    columns: Mapping[str, str] | None = None,
    source: str = "comparisons",
) -> Comparisons:
    """The comparisons in these rows.

    Args:
        cluster: the column that identifies the prompt; "none" treats all rows as independent. By default the first of
            CLUSTERS that the rows have. A row without a value counts as a separate prompt.
        columns: fastdpo's column names (model_a, model_b, winner) -> the names in the rows.
        source: name of the data, for messages.
    Raises:
        ValueError: columns are missing, or no row is usable.
    """
    of = dict(columns or {})
    unknown = [name for name in of if name not in (*MODELS, WINNER)]
    if unknown:
        raise ValueError(f"columns must map names in {[*MODELS, WINNER]}, got {unknown[0]!r}")
    names: dict[str, int] = {}
    prompts: dict[Any, int] = {}
    found: list[tuple[int, int, float, int]] = []
    lengths: list[tuple[float, float]] = []
    left_out: Counter[str] = Counter()
    examples: dict[str, str] = {}  # reason -> its first example
    seen: set[Any] = set()  # winners that are numbers
    reader: _Reader | None = None
    number = -1
    for number, row in enumerate(rows):
        reader = reader or _Reader(row, of, cluster, source)
        try:
            first, second, outcome = reader.result(row)
        except _BadComparison as error:
            reason, *example = error.args
            left_out[reason] += 1
            examples.setdefault(reason, f", such as {example[0]}" if example else "")
            continue
        seen.add(None if reader.has_flags else _winner_number(row.get(reader.winner)))
        prompt = reader.prompt(row)
        key = ("row", number) if prompt is None else ("prompt", prompt)
        found.append(
            (
                names.setdefault(first, len(names)),
                names.setdefault(second, len(names)),
                outcome,
                prompts.setdefault(key, len(prompts)),
            )
        )
        if reader.lengths is not None:
            lengths.append(reader.lengths(row))
    if number < 0:
        raise ValueError(f"{source} must hold at least one comparison, got none")
    if not found:
        reasons = "; ".join(f"{reason}{examples[reason]}: {count:,}" for reason, count in left_out.most_common())
        raise ValueError(
            f"{source} must hold at least one usable comparison, got {number + 1:,} unusable rows: {reasons}"
        )
    if 0 in seen and not seen & {1.5, 2}:
        raise ValueError(
            f"winner must be model_a, model_b or tie, or 1, 2 and 0 for a tie, got only 0 and 1 in {source}: 0 could"
            " mean a tie or the second model. Write model_a, model_b and tie instead"
        )
    first_numbers, second_numbers, outcomes, clusters = zip(*found, strict=True)
    known = np.array(lengths, float) if lengths else None
    if known is not None and np.isnan(known).any():
        known = None  # some rows have no lengths
    return Comparisons(
        tuple(names),
        np.array(first_numbers, np.int64),
        np.array(second_numbers, np.int64),
        np.array(outcomes, float),
        np.array(clusters, np.int64) if len(prompts) < len(found) else None,
        known,
        {f"{reason}{examples[reason]}": count for reason, count in left_out.items()},
    )


class _BadComparison(Exception):
    """The reason why a row is left out, and optionally the value that caused it."""


class _Reader:
    """Reads rows with the columns of the first row."""

    def __init__(self, row: Mapping[str, Any], of: Mapping[str, str], cluster: str | None, source: str) -> None:
        self.columns = [of.get(name, name) for name in MODELS]
        self.winner = of.get(WINNER, WINNER)
        self.has_flags = self.winner not in row and all(name in row for name in FLAGS)
        wanted = self.columns if self.has_flags else [*self.columns, self.winner]
        missing = [name for name in wanted if name not in row]
        if missing:
            is_pairs = "chosen" in row or "rejected" in row
            hint = (
                "rank models on these pairs: --models A B"
                if is_pairs
                else "map your names: --columns model_a=...,winner=..."
            )
            raise ValueError(
                f"{source} must have the columns model_a, model_b and winner, got {sorted(row)} without"
                f" {missing[0]!r}; {hint}"
            )
        if cluster not in (None, "none") and cluster not in row:
            raise ValueError(f"cluster must be one of the columns {sorted(row)} of {source}, got {cluster!r}")
        at_hand = (name for name in CLUSTERS if name in row)
        self.cluster = None if cluster == "none" else cluster or next(at_hand, None)
        self.lengths = _length_reader(row)

    def result(self, row: Mapping[str, Any]) -> tuple[str, str, float]:
        """Both models, and the outcome for the first model."""
        names = [row.get(column) for column in self.columns]
        if not all(isinstance(name, str) and name.strip() for name in names):
            raise _BadComparison("a model without a name")
        first, second = (str(name).strip() for name in names)
        if first == second:
            raise _BadComparison("a model compared with itself")
        if self.has_flags:
            return first, second, _of_flags([row.get(name) for name in FLAGS])
        return first, second, _outcome(row.get(self.winner), first, second)

    def prompt(self, row: Mapping[str, Any]) -> Any:
        """The prompt's identifier, equal for rows of the same prompt; None if the row has none."""
        value = None if self.cluster is None else row.get(self.cluster)
        if value is None or value == "":
            return None
        return value if isinstance(value, (str, int)) else json.dumps(value, sort_keys=True, default=str)


def _outcome(winner: Any, first: str, second: str) -> float:
    if isinstance(winner, str) and winner.strip() in (first, second):
        return 1.0 if winner.strip() == first else 0.0
    number = _winner_number(winner)
    if number in _OUTCOMES:
        return _OUTCOMES[number]
    if not isinstance(winner, str) or not winner.strip():
        is_none = winner is None or winner != winner or (isinstance(winner, str) and not winner.strip())
        raise _BadComparison("no winner") if is_none else _not_one(winner)
    name = plain_name(re.sub(r"^\W+|\W+$", "", winner))
    if name.startswith("tie") or name in TIES or name == "c":  # MT-bench's judge: [[A]], [[B]] or [[C]]
        return 0.5
    verdict = _VERDICT.fullmatch(winner)
    if verdict is not None:
        return {">": 1.0, "=": 0.5, "<": 0.0}[verdict[1][0]]
    verdict = _VERDICT.fullmatch(winner.translate(_MIRRORED))
    if verdict is not None:
        return {">": 0.0, "=": 0.5, "<": 1.0}[verdict[1][0]]
    side = _SIDE.fullmatch(name)
    if side is not None and side[3] in FIRST | SECOND:
        return 1.0 if side[3] in FIRST else 0.0
    raise _not_one(winner)


def _winner_number(winner: Any) -> Any:
    """The winner as a number, also if it is written as text (CSV); None if it is not a number."""
    if isinstance(winner, str):
        return float(winner) if re.fullmatch(r"\s*\d+(\.\d*)?\s*", winner) else None
    return winner if isinstance(winner, (int, float)) and not isinstance(winner, bool) else None


def _not_one(winner: Any) -> _BadComparison:
    return _BadComparison("a winner that is neither of the two models nor a tie", repr(winner)[:40])


def _of_flags(values: Sequence[Any]) -> float:
    """The outcome by winner_model_a, winner_model_b and winner_tie. Exactly one of them must be set."""
    is_set = [str(value).strip().lower() in ("1", "1.0", "true") for value in values]
    if sum(is_set) != 1:
        raise _BadComparison(f"not exactly one of {', '.join(FLAGS)} is set")
    return (1.0, 0.0, 0.5)[is_set.index(True)]


def _length_reader(row: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], tuple[float, float]] | None:
    """A function that reads the lengths of both responses from a row; None if the rows have no lengths."""
    for names in LENGTHS:
        if all(name in row for name in names):
            return lambda row, names=names: (_number(row.get(names[0])), _number(row.get(names[1])))  # type: ignore[misc]
    if isinstance(row.get("conv_metadata"), Mapping) and all(name in row["conv_metadata"] for name in _ARENA):

        def of_metadata(row: Mapping[str, Any]) -> tuple[float, float]:
            metadata = row.get("conv_metadata") or {}
            return _number(metadata.get(_ARENA[0])), _number(metadata.get(_ARENA[1]))

        return of_metadata
    for names in TEXTS:
        if all(name in row for name in names):
            return lambda row, names=names: (_characters(row.get(names[0])), _characters(row.get(names[1])))  # type: ignore[misc]
    return None


def _number(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return float("nan")
    return number if number >= 0 else float("nan")


def _characters(value: Any) -> float:
    """The number of characters of a text, or of the assistant's messages in a conversation."""
    if isinstance(value, str):
        return float(len(value))
    if not isinstance(value, list):
        return float("nan")
    messages = [m for m in value if not isinstance(m, Mapping) or m.get("role", "assistant") == "assistant"]
    return float(sum(len(str(m.get("content") if isinstance(m, Mapping) else m)) for m in messages))


def _read_csv(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a file with a header line. The delimiter is the most frequent of comma, tab and semicolon in it."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            head = lines.readline()
            lines.seek(0)
            delimiter = max(",\t;", key=head.count)
            for row in csv.DictReader(lines, delimiter=delimiter):
                if None in row or None in row.values():
                    raise ValueError(f"{path} must have the same number of cells in every line, got {row}")
                yield row
    except FileNotFoundError:
        raise ValueError(f"dataset file does not exist: {path}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"dataset file cannot be read: {path} ({error})") from None
