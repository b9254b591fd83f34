"""The first row of a dataset: checked before anything is loaded, and shown in the summary at the start of a run, with
roles and text of either side.

In: the raw dataset and the settings. Out: (what, text) lines, each cut to a width. Refused: columns of no known form.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING, Any

from fastdpo.data.forms.formats import read_row, regrouped, template_kwargs
from fastdpo.data.sources.loading import raw_example
from fastdpo.data.tokens.settings import TokenizationSettings
from fastdpo.data.values import BadRow, Example
from fastdpo.types import PreferenceRow

if TYPE_CHECKING:
    from datasets import Dataset

TRIED_ROWS = 100  # so many are looked at for one that can be used
SHOWN_CHARACTERS = 160  # of a message or a text: its start and its end
SHOWN_ANSWERS = 3

Lines = tuple[tuple[str, str], ...]


def check_first_row(dataset: Any, name: str, settings: TokenizationSettings, *, is_sft: bool) -> None:
    """Reads the first row. A row that raises BadRow passes; the report counts it later.

    Args:
        dataset: a dataset, a stream or a list; any other type is refused later, when it is prepared.
    Raises:
        ValueError: the row has no known form.
    """
    try:
        example = next(iter(dataset), None)
    except TypeError:
        return
    if not isinstance(example, dict):
        return
    example = raw_example(example, getattr(dataset, "features", None))
    if "prompt_ids" in example:
        return
    if regrouped((), example, settings.dataset_format, is_sft=is_sft) is not None:
        return  # its rows are no prompts by themselves
    try:
        read_row(example, settings.dataset_format, is_sft=is_sft, columns=settings.columns)
    except BadRow:
        return
    except ValueError as error:
        raise ValueError(f"{error} ({name} dataset)") from None


def first_row(dataset: Dataset, settings: TokenizationSettings, *, is_sft: bool) -> Lines:
    """Lines for the first readable row of a dataset; none if the dataset is tokenized."""
    examples = (raw_example(example, dataset.features) for example in islice(dataset, TRIED_ROWS))
    return row_lines(examples, settings, is_sft=is_sft)


def row_lines(examples: Iterable[Example], settings: TokenizationSettings, *, is_sft: bool) -> Lines:
    """Lines for the first readable row among these."""
    for example in examples:
        if "prompt_ids" in example:
            return ()
        try:
            row, _ = read_row(example, settings.dataset_format, is_sft=is_sft, columns=settings.columns)
            tools = template_kwargs(example, settings.columns).get("tools")
        except BadRow:
            continue
        return ((("tools", _short(json.dumps(tools, ensure_ascii=False))),) if tools else ()) + _lines(row)
    return ()


def _lines(row: PreferenceRow) -> Lines:
    better = {chosen for chosen, _ in row.preferences}
    worse = {rejected for _, rejected in row.preferences}
    lines = _said("prompt", row.prompt)
    for number, response in enumerate(row.responses[:SHOWN_ANSWERS]):
        name = "response"
        if row.preferences and len(row.responses) == 2:
            name = "chosen" if number in better else "rejected"
        elif row.preferences:
            name = "best" if number not in worse else f"answer {number + 1}"
        lines += _said(name, response)
    left = len(row.responses) - SHOWN_ANSWERS
    return (*lines, ("", f"and {left} more answers")) if left > 0 else lines


def _said(name: str, part: str | list[dict[str, Any]]) -> Lines:
    if isinstance(part, str):
        return ((name, _short(part)),)
    lines = []
    for message in part:
        rest = {key: value for key, value in message.items() if key not in ("role", "content")}
        more = f" {json.dumps(rest, ensure_ascii=False, default=str)}" if rest else ""
        lines.append((name, f"{message['role']}: {_short(message['content'] + more)}"))
    return tuple(lines) or ((name, "(nothing)"),)


def _short(text: str) -> str:
    """The text on one line, with visible line breaks and without the middle if it is long."""
    line = text.replace("\r", "\\r").replace("\n", "\\n")
    half = SHOWN_CHARACTERS // 2
    return line if len(line) <= SHOWN_CHARACTERS else f"{line[:half]} ... {line[-half:]}"
