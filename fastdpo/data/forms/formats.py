"""From one example of a dataset (a dict of columns) to a `PreferenceRow`: its format, its arguments for the chat
template, and the ledger of its columns.

In: the columns of an adapter (`forms.adapters`) or of a general form (`forms`), recognised by their names or named by
`dataset_format`; `columns` renames columns and lists ignored ones. Out: text or messages, with the prompt separate from
the responses. Every column is read, reported as ignored, or refused.
Refused with ValueError, because it concerns the whole dataset: columns of no known format, missing columns of a named
format, an unread column with text or messages, images, video and audio.
Refused with BadRow, because it concerns one row, which the caller counts: a value that is not text, a missing answer.

Messages keep their further keys (name, tool_calls, ...); `template_kwargs` reads TRL's columns `tools` and
`chat_template_kwargs`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from fastdpo.data.forms import EXPLICIT, FORMS, RANKED, SFT_FORMS
from fastdpo.data.forms.adapters import ADAPTERS
from fastdpo.data.forms.columns import Cells, is_filled, ledger, structured
from fastdpo.data.forms.context import system_text, with_system
from fastdpo.data.forms.json_text import json_list, parsed
from fastdpo.data.forms.mapping import as_columns, ignored_columns, renamed
from fastdpo.data.forms.names import KINDS, kinds_by_name
from fastdpo.data.values import BadRow, Example, RowFormat, best_response
from fastdpo.types import PreferenceRow

AUTO = "auto"
FORMATS = (EXPLICIT, *ADAPTERS, *FORMS)  # the first that fits: a prompt that somebody added to a dataset counts
_NEARLY = 0.8  # of difflib's ratio, from which a column's name is a slip
FORMAT_NAMES = tuple(dict.fromkeys(row_format.name for row_format in (*FORMATS, *SFT_FORMS)))
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
TEMPLATE_KWARGS = "chat_template_kwargs"
REF_LOGPS = ("ref_chosen_logps", "ref_rejected_logps")
_READ_ELSEWHERE = {TEMPLATE_KWARGS, *REF_LOGPS, *KINDS["tools"]}  # by `template_kwargs`, and as reference log-probs
_BY_COLUMNS: dict[tuple[tuple[str, ...], str, bool], tuple[RowFormat, tuple[str, ...]]] = {}
_MOST_KNOWN = 1000
KNOWN_COLUMNS = tuple(
    dict.fromkeys(
        (
            *("prompt", "chosen", "rejected", "system", "history", "messages", "tools", TEMPLATE_KWARGS, *REF_LOGPS),
            *(column for row_format in (*FORMATS, *SFT_FORMS) for column in row_format.all_columns),
            *(name for names in KINDS.values() for name in names),
        )
    )
)


def check_format_name(name: str) -> None:
    """Raises ValueError with the nearest name if `name` is neither a format nor "auto"."""
    if name != AUTO and name not in FORMAT_NAMES:
        nearest = difflib.get_close_matches(str(name), FORMAT_NAMES, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"dataset_format must be 'auto' or one of {sorted(FORMAT_NAMES)}, got {name!r}{hint}")


def check_columns(value: Any) -> dict[str, Any] | None:
    """The setting `columns` as a dict, given as a dict or as text from the command line; see `forms.mapping`.

    Raises:
        ValueError: the value is not a mapping, or it maps a name that no format reads.
    """
    return as_columns(value, KNOWN_COLUMNS)


def preference_row(
    example: Example, dataset_format: str = AUTO, columns: Mapping[str, Any] | None = None
) -> PreferenceRow:
    """The row, the better response of each preference first: a pair, or a group of ranked answers.

    Raises:
        BadRow: this row cannot be used.
        ValueError: the columns fit no format or not the named one, an unread column holds text, or the example holds
            images, video or audio.
    """
    return read_row(example, dataset_format, is_sft=False, columns=columns)[0]


def sft_row(example: Example, dataset_format: str = AUTO, columns: Mapping[str, Any] | None = None) -> PreferenceRow:
    """The row with K = 1 and no preference: the response of an SFT format, or the best one of a preference format.

    Raises: as `preference_row`.
    """
    return read_row(example, dataset_format, is_sft=True, columns=columns)[0]


def read_row(
    example: Example, dataset_format: str, *, is_sft: bool, columns: Mapping[str, Any] | None = None
) -> tuple[PreferenceRow, RowFormat]:
    """The row and its format; see `preference_row` and `sft_row`. `PreferenceRow.columns` is the ledger of columns."""
    media = [name for name in MEDIA if is_filled(example.get(name))]
    if media:
        raise ValueError(
            f"dataset must hold text only, got the columns {media}; vision and audio models are not supported"
        )
    cells, written = structured(renamed(example, columns))
    ignored = ignored_columns(example, columns)
    seen = Cells({name: value for name, value in cells.items() if name not in ignored} if ignored else cells)
    row_format, sources = _chosen(seen, dataset_format, is_sft)
    if sources:
        seen = Cells({name: value for name, value in seen.items() if name not in sources})
        ignored += sources
    if row_format.name == "implicit" and dataset_format != AUTO:  # the named format has no prompt column
        ignored += tuple(seen)
    row = _read(row_format, seen)
    all_cells = Cells(cells) if ignored else seen
    all_cells.read = seen.read | _READ_ELSEWHERE
    became = ledger(all_cells, row, written, (*ignored, *row_format.further))
    responses, preferences = row.responses, row.preferences
    if is_sft:
        responses, preferences = (responses[best_response(preferences)],), ()
    return PreferenceRow(row.prompt, responses, preferences, became), row_format


def _chosen(cells: Cells, dataset_format: str, is_sft: bool) -> tuple[RowFormat, tuple[str, ...]]:
    """The format of a row, and the columns that its prompt and answers were made from. Both nearly always depend only
    on the column names and are the same for every row."""
    key = (cells.columns, dataset_format, is_sft)
    known = _BY_COLUMNS.get(key)
    if known is not None:
        return known
    cells.has_peeked = False
    row_format = choose_format(cells, dataset_format, is_sft=is_sft)
    result = row_format, _sources(cells) if row_format is EXPLICIT else ()
    if not cells.has_peeked:
        if len(_BY_COLUMNS) > _MOST_KNOWN:
            _BY_COLUMNS.clear()
        _BY_COLUMNS[key] = result
    return result


def choose_format(example: Example, dataset_format: str, *, is_sft: bool) -> RowFormat:
    """The first format that fits the example; for "auto", the first that it unmistakably has."""
    cells = example if isinstance(example, Cells) else Cells(example)
    formats = (*FORMATS, *SFT_FORMS) if is_sft else FORMATS
    if dataset_format == AUTO:
        for row_format in formats:
            if row_format.is_unmistakable(cells):
                return row_format
        forms = (EXPLICIT, *FORMS, *(SFT_FORMS if is_sft else ()))
        if slips := _slips(cells, forms):
            nearest = ", ".join(f"{ours!r} for {theirs!r}" for ours, theirs in slips.items())
            option = ",".join(f"{ours}={theirs}" for ours, theirs in slips.items())
            raise ValueError(
                f"dataset must have the columns of a known format, got {sorted(example)}; did you mean {nearest}?"
                f" Rename, or write --columns {option}"
            )
        known = "; ".join(dict.fromkeys(f"{form.name}: {', '.join(form.columns)}" for form in forms))
        published = ", ".join(dict.fromkeys(adapter.name for adapter in ADAPTERS if not adapter.by_name_only))
        raise ValueError(
            f"dataset must have the columns of a known format ({known}), the columns of a published dataset"
            f" ({published}), or a mapping --columns prompt=THEIRS,chosen=THEIRS,..., got {sorted(example)}"
        )
    named = [row_format for row_format in formats if row_format.name == dataset_format]
    if not named:
        raise ValueError(f"dataset_format must be a preference format, got {dataset_format!r}, which is for SFT")
    regrouped_form = (RANKED,) if any(row_format.regroup for row_format in named) else ()
    for row_format in (*named, *regrouped_form):
        if row_format.fits(cells):
            return row_format
    needed = " or ".join(dict.fromkeys(", ".join(row_format.columns) for row_format in named))
    raise ValueError(f"dataset_format {dataset_format!r} needs the columns {needed}, got {sorted(example)}")


def _slips(cells: Cells, forms: Iterable[RowFormat]) -> dict[str, str]:
    """The columns of the form that a row nearly has: our name, and the row's column with nearly that name."""
    known = {column for form in forms for column in form.all_columns}
    unknown = [column for column in cells.columns if column not in known]
    found: list[tuple[int, dict[str, str]]] = []
    for form in forms:
        missing = [column for column in form.columns if column not in cells.columns]
        near = {name: difflib.get_close_matches(name, unknown, n=1, cutoff=_NEARLY) for name in missing}
        if len(missing) < len(form.columns) and all(near.values()):
            found.append((len(form.columns), {name: columns[0] for name, columns in near.items()}))
    return max(found, key=lambda form: (form[0], -len(form[1])), default=(0, {}))[1]


def regrouped(
    examples: Iterable[Example], first: Example, dataset_format: str, *, is_sft: bool
) -> Iterator[Example] | None:
    """Rows of the form `ranked`, one per prompt, if the dataset's rows are trees or single answers; else None.

    Args:
        examples: all rows of the dataset.
        first: the example that decides the format.
    """
    try:
        row_format = choose_format(first, dataset_format, is_sft=is_sft)
    except ValueError:  # reported with its row when it is read
        return None
    return None if row_format.regroup is None else _with_the_rest(examples, row_format)


def _with_the_rest(examples: Iterable[Example], row_format: RowFormat) -> Iterator[Example]:
    """The regrouped rows, with the first row's columns that the format does not know, so that the ledger reports them.

    These columns get names of no kind, because the content of one row must not become the context of another.
    """
    assert row_format.regroup is not None
    known = row_format.all_columns
    rest: dict[str, Any] = {}

    def seen() -> Iterator[Example]:
        for example in examples:
            kinds = kinds_by_name(tuple(example))
            for name, value in example.items():
                shown = f"{name} of single answers" if name in kinds else name
                if name not in known and shown not in rest and is_filled(value):
                    rest[shown] = value
            yield example

    for row in row_format.regroup(seen()):
        yield {**rest, **row}


def template_kwargs(example: Example, columns: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A row's arguments for the chat template: `tools` (a list, or JSON text of a list) and `chat_template_kwargs`."""
    if (
        columns is None
        and not any(name in example for name in (TEMPLATE_KWARGS, *KINDS["tools"]))
        and not any(isinstance(value, dict) for value in example.values())
    ):
        return {}  # most rows
    cells = Cells(structured(renamed(example, columns))[0])
    kwargs = cells.peek(TEMPLATE_KWARGS) or {}
    if isinstance(kwargs, str):
        kwargs = parsed(kwargs)
        if kwargs is None:
            raise BadRow(f"{TEMPLATE_KWARGS} is not JSON")
    if not isinstance(kwargs, Mapping):
        raise BadRow(f"{TEMPLATE_KWARGS} is not an object")
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    name = cells.filled("tools")
    if name is not None and (not isinstance(cells.peek(name), str) or cells.peek(name).strip()):
        tools = json_list(cells.peek(name), "tools")
        if tools:
            kwargs.setdefault("tools", tools)
    return kwargs


def _read(row_format: RowFormat, cells: Cells) -> PreferenceRow:
    """The row with its system prompt; values that do not fit the format, such as None for a list, make a bad row."""
    try:
        row = row_format.read(cells)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise BadRow(f"the row does not fit the format {row_format.name} ({type(error).__name__}: {error})") from error
    name = cells.filled("system")
    if name is None or name in cells.read or name in row_format.further:
        return row
    system = system_text(cells)
    if isinstance(row.prompt, str):
        return replace(row, prompt="\n\n".join(filter(None, (system, row.prompt))))
    return replace(row, prompt=with_system(row.prompt, system))


def _sources(cells: Cells) -> tuple[str, ...]:
    """The columns of a published dataset that its prompt and answer columns were made from."""
    made = ("prompt", "chosen", "rejected")
    published = [adapter for adapter in ADAPTERS if adapter.is_unmistakable(cells) and "conversations" not in cells]
    return tuple(c for adapter in published for c in adapter.all_columns if c not in made and c in cells)
