"""From examples to the columns of `TokenizedGroup`s and their notes for the report, and back.

In: examples of any format in `formats`, or already tokenized (`prompt_ids`, `chosen_ids`, `rejected_ids`, optionally
`ref_chosen_logps` and `ref_rejected_logps`, or the columns made here). Out: GROUP_COLUMNS and STATE_COLUMNS; an
unusable row has only its reason in `bad_row` and its notes. Refused with ValueError: everything that `formats` refuses.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from fastdpo.data.forms import as_transcript
from fastdpo.data.forms.columns import columns_text
from fastdpo.data.forms.formats import read_row, template_kwargs
from fastdpo.data.rows.loss_rows import as_ranking, with_shared_parts
from fastdpo.data.rows.tokenized import is_tokenized, row_ref_logps, tokenized_group
from fastdpo.data.sources.loading import raw_example
from fastdpo.data.tokens.notes import OPENS, Note, as_columns, loss_reason, note_features
from fastdpo.data.tokens.settings import TokenizationSettings
from fastdpo.data.tokens.tokenization import EncodedRow, RowEncoder
from fastdpo.data.tokens.truncation import LeftOut, truncate
from fastdpo.data.values import BadRow
from fastdpo.types import PreferenceRow, TokenizedGroup

GROUP_COLUMNS = ("prompt_ids", "responses", "loss_masks", "ref_logps", "preferences")
STATE_COLUMNS = (
    "bad_row",
    "is_truncated",
    "has_one_cut",
    "has_stale_ref_logps",
    "is_merged",
    "is_transcript",
    "notes",
    "num_prompt_tokens",
    "num_chosen_tokens",
    "num_rejected_tokens",
    "columns",
)


def group_from_columns(example: Mapping[str, Any]) -> TokenizedGroup:
    """The group in one row of a prepared dataset, or in a row with the columns prompt_ids, chosen_ids, rejected_ids."""
    if "responses" in example:
        preferences = example.get("preferences")
        return TokenizedGroup(
            example["prompt_ids"],
            example["responses"],
            example.get("loss_masks"),
            example.get("ref_logps"),
            ((0, 1),) if preferences is None else tuple((chosen, rejected) for chosen, rejected in preferences),
        )
    return TokenizedGroup(
        example["prompt_ids"], (example["chosen_ids"], example["rejected_ids"]), ref_logps=row_ref_logps(example)
    )


def column_features(*, with_state: bool = True) -> Any:
    """Explicit types of the columns: a column that is None in the first thousand rows would be typed as null."""
    from datasets import Features, List, Value

    ids, count = List(Value("int32")), Value("int32")
    columns = {
        "prompt_ids": ids,
        "responses": List(ids),
        "loss_masks": List(List(Value("bool"))),
        "ref_logps": List(Value("float64")),
        "preferences": List(ids),
        "bad_row": Value("string"),
        "is_truncated": Value("bool"),
        "has_one_cut": Value("bool"),  # one side of a pair has lost its end, the other has not
        "has_stale_ref_logps": Value("bool"),
        "is_merged": Value("bool"),
        "is_transcript": Value("bool"),
        "notes": note_features(),
        "num_prompt_tokens": count,
        "num_chosen_tokens": List(count),  # of each pair; of the response where there is no pair
        "num_rejected_tokens": List(count),
        "columns": Value("string"),  # the `columns_text` of the row's ledger
    }
    return Features({name: columns[name] for name in (*GROUP_COLUMNS, *(STATE_COLUMNS if with_state else ()))})


@dataclass
class RowPreparer:
    """Turns examples into columns, many at a time. It caches facts about tokenizer and template; a copy in another
    process starts with an empty cache."""

    tokenizer: Any
    settings: TokenizationSettings
    is_sft: bool
    features: Any = None  # of a dataset, in which Arrow adds None for missing keys; None for examples from Python
    _encoder: RowEncoder | None = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_encoder": None}

    def __call__(self, batch: Mapping[str, list[Any]], rows: Sequence[int]) -> dict[str, list[Any]]:
        """Prepares a batch of examples in the form of `Dataset.map`: lists of values by column.

        Args:
            rows: row numbers, for error messages.
        Raises:
            ValueError: `formats` refuses a row, or a row is bad and `settings.on_bad_row` is "raise".
        """
        with _uncollected():
            return self._batch(batch, rows)

    def _batch(self, batch: Mapping[str, list[Any]], rows: Sequence[int]) -> dict[str, list[Any]]:
        examples = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        columns = self.columns(examples, rows)
        return {name: [one[name] for one in columns] for name in (*GROUP_COLUMNS, *STATE_COLUMNS)}

    def columns(self, examples: Sequence[Mapping[str, Any]], rows: Sequence[int]) -> list[dict[str, Any]]:
        """The columns of each example; see `__call__`."""
        settings = self.settings
        if self._encoder is None:
            self._encoder = RowEncoder(self.tokenizer, settings.chat_template, settings.chat_template_kwargs)
        read = [self._read(example) for example in examples]
        waiting = iter(self._encoder.encode([(one.row, one.kwargs) for one in read if one.row is not None]))
        columns = []
        for one, row in zip(read, rows, strict=True):
            encoded = EncodedRow(one.group, one.error) if one.row is None else next(waiting)
            columns.append(self._finished(one, encoded, row))
        return columns

    def _read(self, example: Mapping[str, Any]) -> _ReadRow:
        """Reads the example: a row for the encoder, an already tokenized group, or an error."""
        try:
            example = raw_example(example, self.features)
            if is_tokenized(example):
                return _ReadRow(group=tokenized_group(example, is_sft=self.is_sft))
            settings = self.settings
            row, row_format = read_row(example, settings.dataset_format, is_sft=self.is_sft, columns=settings.columns)
            kwargs = template_kwargs(example, settings.columns)
            assert self._encoder is not None
            is_transcript = row_format.may_be_transcript and row.is_conversational
            is_transcript = is_transcript and not self._encoder.takes_messages(kwargs)
            ref_logps = None if self.is_sft else row_ref_logps(example, row)
        except ValueError as error:
            return _ReadRow(error=error)
        columns = columns_text(row.columns)
        return _ReadRow(as_transcript(row) if is_transcript else row, kwargs, ref_logps, is_transcript, columns)

    def _finished(self, read: _ReadRow, encoded: EncodedRow, row: int) -> dict[str, Any]:
        """The columns of one example; an unusable row has only its reason and notes."""
        settings, notes = self.settings, encoded.notes
        try:
            if encoded.error is not None:
                raise encoded.error
            self._check_losses(notes)
            assert encoded.group is not None
            whole = encoded.group if read.row is None else replace(encoded.group, ref_logps=read.ref_logps)
            group = truncate(whole, settings)
            has_one_cut = _has_one_cut(whole, group, settings)
            group = as_ranking(group) if settings.rankings else group
            stored = with_shared_parts(group) if settings.shared_parts else group
        except BadRow as error:
            if settings.on_bad_row == "raise" and not isinstance(error, LeftOut):
                raise ValueError(f"dataset row {row} (counted from 0) cannot be used: {error.reason}") from None
            bad = {"bad_row": error.reason, "notes": as_columns(notes)}
            return dict.fromkeys((*GROUP_COLUMNS, *STATE_COLUMNS)) | bad
        except ValueError as error:
            raise ValueError(f"{error} (dataset row {row}, counted from 0)") from None
        num_context = [_num_context_tokens(group, index) for index in range(len(group.responses))]
        lengths = [len(r) - n for r, n in zip(group.responses, num_context, strict=True)]
        return {
            "prompt_ids": group.prompt_ids,
            "responses": stored.responses,
            "loss_masks": stored.loss_masks,
            "ref_logps": stored.ref_logps,
            "preferences": stored.preferences,
            "bad_row": None,
            "is_truncated": _num_tokens(group) < _num_tokens(whole),
            "has_one_cut": has_one_cut,
            "has_stale_ref_logps": whole.ref_logps is not None and group.ref_logps is None,
            "is_merged": encoded.is_merged and not any(note.kind == OPENS for note in notes),
            "is_transcript": read.is_transcript,
            "notes": as_columns(notes),
            "num_prompt_tokens": len(group.prompt_ids) + num_context[0],
            "num_chosen_tokens": [lengths[chosen] for chosen, _ in group.preferences] or lengths,
            "num_rejected_tokens": [lengths[rejected] for _, rejected in group.preferences],
            "columns": read.columns,
        }

    def _check_losses(self, notes: Sequence[Note]) -> None:
        """Refuses a row with lost content unless `on_lost_content` is "warn"."""
        lost = [note for note in notes if note.is_loss]
        if not lost or self.settings.on_lost_content == "warn":
            return
        reason = loss_reason(lost)
        if self.settings.on_lost_content == "drop":
            raise LeftOut(reason)
        example = next((f" ({note.example})" for note in lost if note.example), "")
        raise ValueError(
            f"{reason}{example}: try another chat_template or chat_template_kwargs, or set on_lost_content='warn' to"
            " train without this content or 'drop' to drop such rows"
        )


@contextmanager
def _uncollected() -> Iterator[None]:
    """Turns garbage collection off: a batch makes thousands of lists but no cycles, and each collection scans every
    imported module."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@dataclass(frozen=True)
class _ReadRow:
    """One example, read."""

    row: PreferenceRow | None = None
    kwargs: dict[str, Any] = field(default_factory=dict)  # for the chat template
    ref_logps: tuple[float, float] | None = None
    is_transcript: bool = False  # messages that became text
    columns: str = ""  # the `columns_text` of the example's ledger
    group: TokenizedGroup | None = None
    error: ValueError | None = None


def _num_context_tokens(group: TokenizedGroup, index: int) -> int:
    """Number of leading tokens of a response that are its own prompt (see TokenizedGroup)."""
    if group.loss_masks is None or len(group.prompt_ids) > 0:
        return 0
    return list(group.loss_masks[index]).index(True)


def _num_tokens(group: TokenizedGroup) -> int:
    return sum(len(group.prompt_ids) + len(response) for response in group.responses)


def _has_one_cut(whole: TokenizedGroup, group: TokenizedGroup, settings: TokenizationSettings) -> bool:
    """Whether truncation removed the end, and with it the EOS, of only one side of a pair."""
    if settings.truncation_mode == "keep_end":
        return False
    is_cut = [len(after) < len(before) for before, after in zip(whole.responses, group.responses, strict=True)]
    return any(is_cut[chosen] != is_cut[rejected] for chosen, rejected in group.preferences)
