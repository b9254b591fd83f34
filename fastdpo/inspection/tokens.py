"""Tokenizes every row: finds truncated and lost content, and counts the tokens to compute.

In: a `Source`, a tokenizer and the settings of a run. Out: a `TokenSurvey`. Rows are tokenized without truncation by
the code that prepares them for training, and then truncated as in training. Refused with ValueError: rows that
preparation refuses, such as messages without a chat template.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np

from fastdpo.data.batches.layout import counted_sequences
from fastdpo.data.batches.microbatches import lay_out_batch
from fastdpo.data.rows.columns import RowPreparer, group_from_columns
from fastdpo.data.rows.report import TokenStats
from fastdpo.data.tokens.control import ControlTokens
from fastdpo.data.tokens.notes import SPELLED, STAYED, Note, NoteCounts
from fastdpo.data.tokens.settings import TokenizationSettings
from fastdpo.data.tokens.truncation import truncate
from fastdpo.data.values import BadRow
from fastdpo.inspection.source import ReadRow, Source
from fastdpo.types import TokenizedGroup

ROWS_AT_ONCE = 256  # rows that are tokenized together
BATCH_SIZE = 8  # rows per batch for counting padding and sharing: the trainer's default
_SHOWN_ROWS = 1000  # row numbers kept for each kind of note


@dataclass
class TokenSurvey:
    """All rows of a dataset as tokens."""

    dropped: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    num_kept: int = 0
    num_pairs: int = 0
    num_transcripts: int = 0  # rows whose messages became plain text because there is no chat template
    one_cut: list[int] = field(default_factory=list)  # rows in which only one side of a pair lost its end
    ends_cut: list[int] = field(default_factory=list)  # rows in which an answer lost its end
    prompts_cut: list[int] = field(default_factory=list)
    spelled: dict[int, tuple[str, ...]] = field(default_factory=dict)  # rows with special tokens in their text
    spelled_as_tokens: list[int] = field(default_factory=list)  # rows in which they become control tokens
    names: Counter[str] = field(default_factory=Counter)  # token -> number of rows
    notes: NoteCounts = field(default_factory=NoteCounts)
    rows_of_note: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    lost: dict[int, str] = field(default_factory=dict)  # row -> the content that it loses
    prompts: list[int] = field(default_factory=list)  # tokens of each kept row's prompt
    longest: list[int] = field(default_factory=list)  # tokens of each row's longest sequence, before truncation
    chosen: list[int] = field(default_factory=list)  # tokens of each pair's answers
    rejected: list[int] = field(default_factory=list)
    num_raw: int = 0  # tokens, with the prompt repeated for each response
    num_unique: int = 0  # tokens to compute, in batches in the order of the file
    num_padded: int = 0  # tokens of the same batches, padded
    num_together: int = 0  # tokens to compute if all rows of a prompt are in one batch

    def stats(self) -> dict[str, TokenStats]:
        """Statistics of prompt, chosen and rejected, after truncation."""
        lengths = {"prompt": self.prompts, "chosen": self.chosen, "rejected": self.rejected}
        return {name: TokenStats.of(values) for name, values in lengths.items() if values}


def survey_tokens(
    source: Source, tokenizer: Any, settings: TokenizationSettings, progress: Any = lambda rows: rows
) -> TokenSurvey:
    """Tokenizes all rows.

    Args:
        progress: wraps the iteration over rows, as tqdm does.
    Raises:
        ValueError: preparation for training refuses a row.
    """
    whole = replace(settings, max_length=None, max_prompt_length=None, on_bad_row="drop", on_lost_content="warn")
    preparer = RowPreparer(tokenizer, whole, is_sft=False)
    control = ControlTokens(tokenizer)
    survey, counter = TokenSurvey(), _Counter()
    rows = iter(progress(source.rows()))
    while batch := list(islice(rows, ROWS_AT_ONCE)):
        columns = preparer.columns([read.example for read in batch], [read.number for read in batch])
        for read, row_columns in zip(batch, columns, strict=True):
            group = _add(survey, read, row_columns, settings)
            _add_spelled(survey, read, row_columns, control)
            if group is not None:
                counter.add(group)
    counter.finish(survey)
    return survey


def _add(
    survey: TokenSurvey, read: ReadRow, columns: Mapping[str, Any], settings: TokenizationSettings
) -> TokenizedGroup | None:
    """Adds a row to the survey. Returns its group as training uses it, or None if the row is unusable."""
    notes = [Note(**note) for note in columns["notes"] or ()]
    survey.notes.add(read.number, notes)
    for kind in {note.kind for note in notes}:
        if len(survey.rows_of_note[kind]) < _SHOWN_ROWS:
            survey.rows_of_note[kind].append(read.number)
    losses = dict.fromkeys(f"{note.what} of {note.side}" if note.side else note.what for note in notes if note.is_loss)
    if losses:
        survey.lost[read.number] = ", ".join(losses)
    if columns["bad_row"] is not None:
        survey.dropped[columns["bad_row"]].append(read.number)
        return None
    whole = group_from_columns(columns)
    survey.longest.append(len(whole.prompt_ids) + max(map(len, whole.responses)))
    try:
        group = truncate(whole, settings)
    except BadRow as error:
        survey.dropped[error.reason].append(read.number)
        return None
    _add_cuts(survey, read.number, whole, group, settings)
    survey.num_kept += 1
    survey.num_pairs += len(group.preferences)
    survey.num_transcripts += bool(columns["is_transcript"])
    counted = [int(sequence.is_counted.sum()) for sequence in counted_sequences(group)]
    survey.prompts.append(len(group.prompt_ids))
    survey.chosen += [counted[better] for better, _ in group.preferences]
    survey.rejected += [counted[worse] for _, worse in group.preferences]
    return group


def _add_cuts(
    survey: TokenSurvey, number: int, whole: TokenizedGroup, group: TokenizedGroup, settings: TokenizationSettings
) -> None:
    if len(group.prompt_ids) < len(whole.prompt_ids):
        survey.prompts_cut.append(number)
    if settings.truncation_mode == "keep_end":  # never cuts the end of an answer
        return
    is_cut = [len(after) < len(before) for before, after in zip(whole.responses, group.responses, strict=True)]
    if any(is_cut):
        survey.ends_cut.append(number)
    if any(is_cut[better] != is_cut[worse] for better, worse in whole.preferences):
        survey.one_cut.append(number)


def _add_spelled(survey: TokenSurvey, read: ReadRow, columns: Mapping[str, Any], control: ControlTokens) -> None:
    """Records special tokens that the text spells out. In messages they are tokenized as plain characters."""
    if read.row is None:
        return
    names = list(dict.fromkeys(name for text in _texts(read) for name in control.found_in(text)))
    kinds = {note["kind"] for note in columns["notes"] or ()}
    if read.row.is_conversational:
        kinds.discard(SPELLED)
    elif SPELLED not in kinds:  # they are only at the ends of a text, where they belong
        return
    if not names:
        return
    survey.spelled[read.number] = tuple(names)
    survey.names.update(names)
    if kinds & {SPELLED, STAYED}:
        survey.spelled_as_tokens.append(read.number)


def _texts(read: ReadRow) -> Iterator[str]:
    assert read.row is not None
    for part in (read.row.prompt, *read.row.responses):
        yield from [part] if isinstance(part, str) else (message["content"] for message in part)


class _Counter:
    """Counts the tokens to compute, batch by batch."""

    def __init__(self) -> None:
        self._batch: list[TokenizedGroup] = []
        self._prompts: set[bytes] = set()  # digests of the prompts counted so far
        self.num_raw = self.num_unique = self.num_padded = self.num_repeated = 0

    def add(self, group: TokenizedGroup) -> None:
        self._batch.append(group)
        if len(self._batch) == BATCH_SIZE:
            self._count()

    def finish(self, survey: TokenSurvey) -> None:
        if self._batch:
            self._count()
        survey.num_raw, survey.num_unique, survey.num_padded = self.num_raw, self.num_unique, self.num_padded
        survey.num_together = self.num_unique - self.num_repeated

    def _count(self) -> None:
        lengths = [_lengths(group) for group in self._batch]
        flat = [length for group_lengths in lengths for length in group_lengths]
        self.num_raw += sum(flat)
        self.num_padded += len(flat) * max(flat)
        layouts = lay_out_batch(self._batch)
        self.num_unique += sum(layout.num_tokens for layout in layouts)
        for layout in layouts:
            prompt = np.asarray(layout.group.prompt_ids, dtype=np.int32)
            digest = hashlib.blake2b(prompt.tobytes(), digest_size=16).digest()
            if digest in self._prompts:
                self.num_repeated += len(prompt)
            self._prompts.add(digest)
        self._batch = []


def _lengths(group: TokenizedGroup) -> Sequence[int]:
    """The number of tokens, including the prompt, of each response that is in a pair."""
    used = sorted({index for pair in group.preferences for index in pair})
    return [len(group.prompt_ids) + len(group.responses[index]) for index in used]
