"""Reads the rows of a dataset for the checks: one at a time, and repeatedly.

In: a file, a folder, a name, a Dataset, a stream or a list of dicts, in any form of preferences. Out: one `ReadRow` per
row; trees and single answers give one per prompt. Rows are kept in memory only for forms that must be read as a whole.
Refused with ValueError: rows that `formats` refuses (with the row's number), and data without rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from fastdpo.data.forms.formats import read_row, regrouped, template_kwargs
from fastdpo.data.rows.columns import group_from_columns
from fastdpo.data.sources.loading import iterate_examples, raw_example
from fastdpo.data.tokens.settings import TokenizationSettings
from fastdpo.data.tokens.tokenization import usable_preferences
from fastdpo.data.values import BadRow, Example
from fastdpo.types import PreferenceRow

TOKENIZED = "tokenized"  # the form of rows that hold token ids


@dataclass(frozen=True)
class ReadRow:
    """One row, read as training reads it."""

    number: int  # from 0
    example: Example  # the row in the file; for trees and single answers, the ranked row made from them
    row: PreferenceRow | None = None  # None if the row is unusable. Its preferences are between different answers
    reason: str = ""  # why the row is unusable
    form: str = ""
    kwargs: Mapping[str, Any] = field(default_factory=dict)  # for the chat template


class Source:
    """Rows that can be read more than once.

    Args:
        data: a path or name as for `--dataset`, a Dataset, a stream, or a list of dicts.
        settings: only dataset_format and columns matter.
        split, config_name: of a folder or a published dataset.
    """

    def __init__(
        self, data: Any, settings: TokenizationSettings, *, split: str = "train", config_name: str | None = None
    ) -> None:
        is_path = isinstance(data, (str, Path))
        if not is_path and (not isinstance(data, Iterable) or iter(data) is data or isinstance(data, Mapping)):
            raise ValueError(
                "data must be a file, a folder, a name, a datasets.Dataset (one split) or a list of dicts, got"
                f" {type(data).__name__}"
            )
        self.data, self.settings = data, settings
        self.split, self.config_name = split, config_name
        self.name = str(data) if is_path else type(data).__name__

    def examples(self) -> Iterator[Example]:
        """Every row, unchanged; for trees and single answers, the ranked rows made from them.

        Raises:
            ValueError: there are no rows, or rows of trees or single answers differ in form.
        """
        examples = self._raw()
        first = next(examples, None)
        if first is None:
            raise ValueError(f"data must hold at least one row, got none in {self.name}")
        everything = chain((first,), examples)
        grouped = regrouped(everything, first, self.settings.dataset_format, is_sft=False)
        if grouped is None:
            yield from everything
            return
        try:
            yield from grouped
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                "data rows must all have the form of the first, because their answers are grouped by prompt, got"
                f" another form ({type(error).__name__}: {error})"
            ) from error

    def _raw(self) -> Iterator[Example]:
        if isinstance(self.data, (str, Path)):
            yield from iterate_examples(self.data, self.split, self.config_name)
            return
        features = getattr(self.data, "features", None)
        for number, example in enumerate(self.data):
            if not isinstance(example, Mapping):
                raise ValueError(f"data rows must be dicts, got {type(example).__name__} as row {number}")
            yield raw_example(example, features)

    def rows(self) -> Iterator[ReadRow]:
        """Reads every row.

        Raises:
            ValueError: a row has no known form, or `formats` refuses it.
        """
        for number, example in enumerate(self.examples()):
            yield self._read(number, example)

    def pick(self, numbers: Iterable[int]) -> dict[int, ReadRow]:
        """The rows with these numbers."""
        wanted = set(numbers)
        if not wanted:
            return {}
        last, found = max(wanted), {}
        for number, example in enumerate(self.examples()):
            if number in wanted:
                found[number] = self._read(number, example)
            if number == last:
                break
        return found

    def _read(self, number: int, example: Example) -> ReadRow:
        settings, form = self.settings, ""
        try:
            if "prompt_ids" in example:
                return ReadRow(number, example, _row_of_ids(example), form=TOKENIZED)
            row, row_format = read_row(example, settings.dataset_format, is_sft=False, columns=settings.columns)
            form = row_format.name
            kwargs = template_kwargs(example, settings.columns)
            row = PreferenceRow(row.prompt, row.responses, usable_preferences(row), row.columns)
        except BadRow as error:
            return ReadRow(number, example, reason=error.reason, form=form)
        except ValueError as error:
            raise ValueError(f"{error} (row {number} of {self.name}, counted from 0)") from None
        return ReadRow(number, example, row, form=form, kwargs=kwargs)


def _row_of_ids(example: Example) -> PreferenceRow:
    """A row of token ids as texts whose words are the ids, so that rows can be compared like texts."""
    try:
        group = group_from_columns(example)
    except (KeyError, TypeError, ValueError) as error:
        raise BadRow(f"not a row of token ids ({type(error).__name__}: {error})") from error
    responses = tuple(" ".join(map(str, response)) for response in group.responses)
    row = PreferenceRow(" ".join(map(str, group.prompt_ids)), responses, tuple(group.preferences))
    return PreferenceRow(row.prompt, responses, usable_preferences(row))
