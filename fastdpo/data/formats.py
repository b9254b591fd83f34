"""From one example of a dataset (a dict of columns) to a `PreferenceRow`: which format it has, and what of it goes to
the chat template.

In: the columns of an adapter (`fastdpo.data.adapters`) or of a general form (`fastdpo.data.forms`), recognised by their
names, or as `dataset_format` says. Out: text or messages, with the prompt apart from the responses.
Refused with ValueError, because it concerns the whole dataset: columns that no format knows or that a named one lacks,
a column that looks like the prompt and would not be read, images, video and audio.
Refused with BadRow, because it concerns one row, which the caller counts: a value that is not text, a missing answer.

Messages keep their further keys (name, tool_calls, ...); `template_kwargs` reads TRL's columns `tools` and
`chat_template_kwargs`.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator
from typing import Any

from fastdpo.data.adapters import ADAPTERS
from fastdpo.data.forms import EXPLICIT, FORMS, RANKED, SFT_FORMS
from fastdpo.data.values import BadRow, Example, RowFormat, best_response, without_nones
from fastdpo.types import PreferenceRow

AUTO = "auto"
FORMATS = (EXPLICIT, *ADAPTERS, *FORMS)  # the first that fits: a prompt that somebody added to a dataset counts
FORMAT_NAMES = tuple(dict.fromkeys(row_format.name for row_format in (*FORMATS, *SFT_FORMS)))
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
QUESTION_COLUMNS = ("question", "query", "input", "instruction", "history", "context")  # never read by `implicit`


def check_format_name(name: str) -> None:
    """Raises ValueError with the nearest name where `name` is neither a format nor "auto"."""
    if name != AUTO and name not in FORMAT_NAMES:
        nearest = difflib.get_close_matches(str(name), FORMAT_NAMES, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"dataset_format must be 'auto' or one of {sorted(FORMAT_NAMES)}, got {name!r}{hint}")


def preference_row(example: Example, dataset_format: str = AUTO) -> PreferenceRow:
    """The row, the better response of each preference first: a pair, or a group where more answers are ranked.

    Raises:
        BadRow: this row cannot be used.
        ValueError: no format, or not the named one, has these columns, or the example holds images, video or audio.
    """
    return read_row(example, dataset_format, is_sft=False)[0]


def sft_row(example: Example, dataset_format: str = AUTO) -> PreferenceRow:
    """The row with K = 1 and no preference: the response of an SFT format, or the best one of a preference format.

    Raises: as `preference_row`.
    """
    return read_row(example, dataset_format, is_sft=True)[0]


def read_row(example: Example, dataset_format: str, *, is_sft: bool) -> tuple[PreferenceRow, RowFormat]:
    """The row and the format that it was read by; see `preference_row` and `sft_row`."""
    media = [name for name in MEDIA if _is_filled(example.get(name))]
    if media:
        raise ValueError(
            f"dataset must hold text only, got the columns {media}; vision and audio models are not supported"
        )
    row_format = choose_format(example, dataset_format, is_sft=is_sft)
    row = _read(row_format, example)
    if dataset_format == AUTO and row_format.name == "implicit":
        _check_question(example, row)
    if is_sft:
        row = PreferenceRow(row.prompt, (row.responses[best_response(row.preferences)],), preferences=())
    return row, row_format


def choose_format(example: Example, dataset_format: str, *, is_sft: bool) -> RowFormat:
    """The first format that the example fits: of the named ones, or of those that it is unmistakably one of."""
    formats = (*FORMATS, *SFT_FORMS) if is_sft else FORMATS
    if dataset_format == AUTO:
        for row_format in formats:
            if row_format.is_unmistakable(example):
                return row_format
        forms = (EXPLICIT, *FORMS, *(SFT_FORMS if is_sft else ()))
        known = "; ".join(f"{form.name}: {', '.join(form.columns)}" for form in forms)
        published = ", ".join(dict.fromkeys(adapter.name for adapter in ADAPTERS if not adapter.by_name_only))
        raise ValueError(
            f"dataset must have the columns of a known format ({known}; or those of a dataset as it is published:"
            f" {published}), got {sorted(example)}"
        )
    named = [row_format for row_format in formats if row_format.name == dataset_format]
    if not named:
        raise ValueError(f"dataset_format must be a format of preferences, got {dataset_format!r}, which has none")
    regrouped_form = (RANKED,) if any(row_format.regroup for row_format in named) else ()
    for row_format in (*named, *regrouped_form):
        if row_format.fits(example):
            return row_format
    needed = " or ".join(", ".join(row_format.columns) for row_format in named)
    raise ValueError(f"dataset_format {dataset_format!r} needs the columns {needed}, got {sorted(example)}")


def regrouped(
    examples: Iterable[Example], first: Example, dataset_format: str, *, is_sft: bool
) -> Iterator[Example] | None:
    """Rows of the form `ranked`, one for each prompt, where those of the dataset are something else; or None.

    Args:
        examples: all rows of the dataset.
        first: one of them, by which the format is chosen.
    """
    try:
        row_format = choose_format(first, dataset_format, is_sft=is_sft)
    except ValueError:  # told with its row when it is read
        return None
    return None if row_format.regroup is None else row_format.regroup(examples)


def template_kwargs(example: Example) -> dict[str, Any]:
    """What a row gives to the chat template: `tools` (a list, or JSON text of one) and `chat_template_kwargs`."""
    kwargs = example.get("chat_template_kwargs") or {}
    if isinstance(kwargs, str):
        kwargs = _from_json(kwargs, "chat_template_kwargs")
    kwargs = without_nones(kwargs)
    if not isinstance(kwargs, dict):
        raise BadRow("chat_template_kwargs is not an object")
    tools = example.get("tools")
    if isinstance(tools, str) and tools.strip():
        tools = _from_json(tools, "tools")
    if tools:
        if not isinstance(tools, list):
            raise BadRow("tools is not a list")
        kwargs.setdefault("tools", without_nones(tools))
    return kwargs


def _from_json(text: str, column: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise BadRow(f"{column} is not JSON") from None


def _read(row_format: RowFormat, example: Example) -> PreferenceRow:
    """The row; one whose columns hold something else than the format's, as None for a list, is a bad row."""
    try:
        return row_format.read(example)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise BadRow(f"not a row of {row_format.name} ({type(error).__name__}: {error})") from error


def _is_filled(value: Any) -> bool:
    return value is not None and not (isinstance(value, (list, tuple, str)) and len(value) == 0)


def _check_question(example: Example, row: PreferenceRow) -> None:
    """Refuses two answers beside a question that they do not repeat: without it there would be no prompt."""
    prompt = row.prompt if isinstance(row.prompt, str) else "\n".join(message["content"] for message in row.prompt)
    for name in QUESTION_COLUMNS:
        text = example.get(name)
        if isinstance(text, str) and text.strip() and text.strip() not in prompt:
            raise ValueError(
                f"dataset has chosen and rejected without a prompt, and the column {name!r}, which looks like it:"
                " rename it to prompt, or set dataset_format='implicit' where it does not belong to them"
            )
