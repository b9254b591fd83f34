"""What the tokenizer makes of every row: what is cut, what is lost, and how many tokens there are to compute.

In: a `Source`, a tokenizer and the settings of a run. Out: a `TokenSurvey`. Rows are tokenized whole, by what prepares
them for training, then cut as training cuts them, so that what was cut is known. Refused with ValueError: what
preparing refuses, as messages without a chat template.
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

ROWS_AT_ONCE = 256  # tokenized together
BATCH_SIZE = 8  # rows of a step, of which padding and sharing are counted: the trainer's default
_SHOWN_ROWS = 1000  # numbers kept of each kind of note


@dataclass
class TokenSurvey:
    """All rows of a dataset as tokens."""

    dropped: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    num_kept: int = 0
    num_pairs: int = 0
    num_transcripts: int = 0  # messages that became text, for lack of a chat template
    one_cut: list[int] = field(default_factory=list)  # rows of which one side of a pair lost its end
    ends_cut: list[int] = field(default_factory=list)  # rows of which an answer lost its end
    prompts_cut: list[int] = field(default_factory=list)
    spelled: dict[int, tuple[str, ...]] = field(default_factory=dict)  # rows with special tokens in their text
    spelled_as_tokens: list[int] = field(default_factory=list)  # those in which they are control tokens
    names: Counter[str] = field(default_factory=Counter)  # rows of each such token
    notes: NoteCounts = field(default_factory=NoteCounts)
    rows_of_note: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    lost: dict[int, str] = field(default_factory=dict)  # rows that lose content, and what
    prompts: list[int] = field(default_factory=list)  # tokens of each kept row's prompt
    longest: list[int] = field(default_factory=list)  # tokens of each row's longest sequence, before cutting
    chosen: list[int] = field(default_factory=list)  # tokens of each pair's answers
    rejected: list[int] = field(default_factory=list)
    num_raw: int = 0  # tokens with the prompt once a response
    num_unique: int = 0  # tokens that are computed, of batches in the order of the file
    num_padded: int = 0  # tokens of the same batches, padded
    num_together: int = 0  # tokens that are computed where the rows of a prompt are in one batch

    def stats(self) -> dict[str, TokenStats]:
        """Of prompt, chosen and rejected, as training has them."""
        lengths = {"prompt": self.prompts, "chosen": self.chosen, "rejected": self.rejected}
        return {name: TokenStats.of(values) for name, values in lengths.items() if values}


def survey_tokens(
    source: Source, tokenizer: Any, settings: TokenizationSettings, progress: Any = lambda rows: rows
) -> TokenSurvey:
    """Tokenizes all rows.

    Args:
        progress: wraps the iteration over rows, as tqdm does.
    Raises:
        ValueError: what preparing refuses.
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
    """Takes down a row; the group that is trained on, or None where it cannot be used."""
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
    if settings.truncation_mode == "keep_end":  # no end is cut
        return
    is_cut = [len(after) < len(before) for before, after in zip(whole.responses, group.responses, strict=True)]
    if any(is_cut):
        survey.ends_cut.append(number)
    if any(is_cut[better] != is_cut[worse] for better, worse in whole.preferences):
        survey.one_cut.append(number)


def _add_spelled(survey: TokenSurvey, read: ReadRow, columns: Mapping[str, Any], control: ControlTokens) -> None:
    """Special tokens that the text spells out. In messages they are tokenized as the characters that they are."""
    if read.row is None:
        return
    names = list(dict.fromkeys(name for text in _texts(read) for name in control.found_in(text)))
    kinds = {note["kind"] for note in columns["notes"] or ()}
    if read.row.is_conversational:
        kinds.discard(SPELLED)
    elif SPELLED not in kinds:  # only at the ends of a text, where they belong
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
    """Tokens to compute, batch by batch."""

    def __init__(self) -> None:
        self._batch: list[TokenizedGroup] = []
        self._prompts: set[bytes] = set()  # digests of those that were counted
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
    """Of each sequence that is compared, the prompt with it."""
    used = sorted({index for pair in group.preferences for index in pair})
    return [len(group.prompt_ids) + len(group.responses[index]) for index in used]
