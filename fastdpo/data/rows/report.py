"""The report on a prepared dataset, in numbers (`DataReport`) and in words (`DataReport.lines`); for a stream, the
report so far (`StreamReport`).

Row numbers count from 0, in the order of the dataset.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fastdpo.data.forms.columns import ColumnLedger
from fastdpo.data.tokens.notes import FIELD, LOST, OPENS, PLAIN_TEXT, SPELLED, STAYED, UNKNOWN, Note, NoteCounts

SHOWN_ROWS = 8  # row numbers per reason in the text; the report of a dataset holds all, that of a stream no more
MOST_REASONS = 100  # of dropped rows of a stream: some quote the row, and a stream may never end
OTHER_REASONS = "other reasons"


@dataclass(frozen=True)
class TokenStats:
    """Distribution of token counts over the kept rows."""

    mean: float
    median: float
    p95: int  # the smallest length that 95 % of the rows do not exceed
    max: int
    total: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> TokenStats:
        """Statistics of at least one length."""
        ordered = sorted(lengths)
        p95 = ordered[math.ceil(0.95 * len(ordered)) - 1]
        return cls(statistics.fmean(ordered), statistics.median(ordered), p95, ordered[-1], sum(ordered))


@dataclass(frozen=True)
class DataReport:
    """Counts of kept, dropped and changed rows of one dataset."""

    kind: str  # kind of rows: "pairs" or "examples"
    num_rows: int
    num_kept: int
    dropped: dict[str, tuple[int, ...]] = field(default_factory=dict)  # reason -> rows
    num_truncated: int = 0  # kept rows that lost tokens to max_prompt_length or max_length
    num_one_cut: int = 0  # those of them in which one side of a pair lost its end, and its EOS, and the other did not
    num_stale_ref_logps: int = 0  # those of them that brought reference log-probs, which are not used
    num_merged_boundary: int = 0  # kept rows whose prompt ends in tokens that merge with the response
    num_pairs: int = 0  # of the kept rows; a row of ranked answers has several
    num_transcripts: int = 0  # kept rows whose messages were written as text, for lack of a chat template
    unread: tuple[str, ...] = ()  # columns of the dataset, and keys of its messages, that were not read
    first_row: tuple[tuple[str, str], ...] = ()  # the first usable row: (role, text) lines
    notes: NoteCounts = field(default_factory=NoteCounts)  # content lost by templates, and other remarks
    tokens: dict[str, TokenStats] = field(
        default_factory=dict
    )  # "prompt", "chosen", "rejected"; SFT "prompt", "response"

    @property
    def num_dropped(self) -> int:
        return self.num_rows - self.num_kept

    def stale_line(self) -> str:
        """The line about ignored reference log-probs of truncated rows."""
        return (
            f"ignored the dataset's reference log-probs of {self.num_stale_ref_logps} {self.kind}: they belong to the"
            " whole text, which was truncated"
        )

    def warnings(self) -> list[str]:
        """The lines of the report that a user must not miss."""
        stale = [self.stale_line()] if self.num_stale_ref_logps else []
        return [*stale, *loss_lines(self.notes, self.num_rows)]

    def lines(self) -> list[str]:
        """The report in words: the remarks, then token statistics."""
        lines = self.remarks()
        if self.tokens:
            lines.append(f"{'tokens':<10}{'mean':>9}{'median':>9}{'p95':>7}{'max':>7}{'total':>11}")
        for name, stats in self.tokens.items():
            row = f"{stats.mean:>9.1f}{stats.median:>9.1f}{stats.p95:>7}{stats.max:>7}{stats.total:>11}"
            lines.append(f"{name:<10}{row}")
        return lines

    def remarks(self) -> list[str]:
        """Kept rows, dropped rows by reason, content lost by the template, truncated rows."""
        kind, pairs = self.kind, ""
        if self.num_pairs > self.num_kept:
            kind, pairs = "prompts", f" with {self.num_pairs} pairs of answers"
        lines = [f"kept {self.num_kept} of {self.num_rows} {kind}{pairs}{self._dropped_text()}"]
        if self.unread:
            lines.append(unread_line(self.unread))
        lines += loss_lines(self.notes, self.num_rows)
        if self.num_truncated:
            lines.append(f"truncated {self.num_truncated} {kind}")
        if self.num_one_cut:
            lines.append(
                f"in {self.num_one_cut} of these, only one side lost its end and its end-of-text token: to compare"
                " whole answers, raise max_length or set on_long_row='drop'"
            )
        if self.num_stale_ref_logps:
            lines.append(self.stale_line())
        if self.num_merged_boundary:
            lines.append(
                f"moved the prompt's last tokens to the response in {self.num_merged_boundary} {kind}, "
                "because the tokenizer merges the prompt's end with the response"
            )
        if self.num_transcripts:
            lines.append(
                f'wrote the messages of {self.num_transcripts} {kind} as text, "Human: ... Assistant: ...", because the'
                " tokenizer has no chat template"
            )
        return lines + note_lines(self.notes, kind)

    def _dropped_text(self) -> str:
        return _dropped_text(self.dropped, {reason: len(rows) for reason, rows in self.dropped.items()})


class StreamReport:
    """The report on the rows of a stream that this process has read; rows read by data loader workers are unknown here.
    A row that is read again in a later epoch counts once: rows come in order, so it is one below `num_rows`. What the
    report holds does not grow with the stream."""

    tokens: dict[str, TokenStats]

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.tokens = {}  # unknown before the end of a stream
        self.num_rows = 0
        self.first_row: tuple[tuple[str, str], ...] = ()
        self.notes = NoteCounts()
        self._counts: dict[str, int] = {}  # reason -> dropped rows
        self._first_rows: dict[str, list[int]] = {}  # reason -> its first rows
        self._columns = ColumnLedger()

    def add_columns(self, row: int, columns: str | None) -> None:
        """Records the column ledger of a row, the text from `columns_text`.

        Raises:
            ValueError: a column is text in this row and messages in an earlier one, or the other way round.
        """
        if columns:
            self._columns.add(columns, lambda _: row)

    def add(self, row: int, reason: str | None, notes: Sequence[Note] = ()) -> None:
        """Records a row; logs the first dropped row of each reason and the first row of each kind of loss."""
        if row < self.num_rows:
            return
        self._add_notes(row, notes)
        self.num_rows = row + 1
        if reason is None:
            return
        if reason not in self._counts and len(self._counts) >= MOST_REASONS:
            reason = OTHER_REASONS
        if reason not in self._counts:
            from transformers.utils import logging

            logger = logging.get_logger(__name__)
            logger.warning(f"dropped row {row} of a stream (counted from 0): {reason}; more such rows are only counted")
        self._counts[reason] = self._counts.get(reason, 0) + 1
        first_rows = self._first_rows.setdefault(reason, [])
        if len(first_rows) < SHOWN_ROWS:
            first_rows.append(row)

    def _add_notes(self, row: int, notes: Sequence[Note]) -> None:
        from transformers.utils import logging

        known = {(kind, what) for kind in (LOST, UNKNOWN, OPENS, PLAIN_TEXT) for what in self.notes.whats(kind)}
        self.notes.add(row, notes)
        new = NoteCounts()
        new.add(row, [note for note in notes if (note.kind, note.what) not in known])
        for line in [*loss_lines(new, 1), *note_lines(new, self.kind)]:
            logging.get_logger(__name__).warning(f"row {row} while streaming: {line}; more such rows are only counted")

    @property
    def num_dropped(self) -> int:
        return sum(self._counts.values())

    @property
    def num_kept(self) -> int:
        return self.num_rows - self.num_dropped

    @property
    def dropped(self) -> dict[str, tuple[int, ...]]:
        """The first dropped rows of each reason."""
        return {reason: tuple(rows) for reason, rows in self._first_rows.items()}

    def lines(self) -> list[str]:
        """The report so far, in words."""
        kept = (
            f"kept {self.num_kept} of the first {self.num_rows} {self.kind}{_dropped_text(self.dropped, self._counts)}"
        )
        first = "a stream, tokenized as it is read" + (f"; {kept}" if self.num_rows else "")
        unread = [unread_line(self._columns.unread)] if self._columns.unread else []
        return [first, *unread, *loss_lines(self.notes, self.num_rows)]

    remarks = lines


Report = DataReport | StreamReport


def unread_line(unread: Sequence[str]) -> str:
    """The line with the unread columns."""
    return f"columns not read: {', '.join(unread)}"


def loss_lines(notes: NoteCounts, num_rows: int) -> list[str]:
    """Lines about content that is missing from the tokens, by kind and side, with counts and an example each; and about
    text that only the prompt alone ends in."""
    lines = []
    for kind, words in ((LOST, "the chat template leaves out {}"), (UNKNOWN, "the tokenizer does not know some {}")):
        for what in notes.whats(kind):
            counts = ", ".join(f"{count:,} of {num_rows:,} {side}" for side, count in notes.sides(kind, what).items())
            row, example = notes.example(kind, what)
            lines.append(f"{words.format(what)}: {counts}; row {row}" + (f": {example!r}" if example else ""))
    ends = notes.whats(OPENS)
    if ends:
        more = f" and {len(ends) - 1} other ends" if len(ends) > 1 else ""
        lines.append(
            f"the prompt alone ends in {ends[0]!r}{more}, but the conversation lacks this before the response:"
            f" {notes.num_rows(OPENS):,} of {num_rows:,}; the model is prompted with it, but never trained on it."
            " Try another chat_template, or chat_template_kwargs such as enable_thinking"
        )
    return lines


def note_lines(notes: NoteCounts, kind: str) -> list[str]:
    """Further remarks about rows of this kind, "pairs" or "examples"."""
    lines = []
    if notes.num_rows(STAYED):
        lines.append(
            f"special tokens that messages spell out stay control tokens in {notes.num_rows(STAYED):,} {kind}: this"
            " tokenizer turns even their separate characters into the token"
        )
    if notes.num_rows(SPELLED):
        names = ", ".join(notes.whats(SPELLED))
        lines.append(f"plain text spells out {names} in {notes.num_rows(SPELLED):,} {kind}, read as a control token")
    if notes.num_rows(PLAIN_TEXT):
        lines.append(
            f"{notes.num_rows(PLAIN_TEXT):,} {kind} are plain text, which is tokenized without the chat template"
        )
    if notes.num_rows(FIELD):
        lines.append(f"message fields that the chat template ignores: {', '.join(notes.whats(FIELD))}")
    return lines


def _dropped_text(dropped: Mapping[str, Sequence[int]], counts: Mapping[str, int]) -> str:
    """The dropped rows in words, by reason; `dropped` holds at least the rows that are shown."""
    if not counts:
        return ""
    reasons = []
    for reason, count in sorted(counts.items(), key=lambda item: -item[1]):
        shown = ", ".join(map(str, dropped[reason][:SHOWN_ROWS])) + (", ..." if count > SHOWN_ROWS else "")
        reasons.append(f"{reason} ({count}: {'row' if count == 1 else 'rows'} {shown})")
    return f"; dropped {sum(counts.values())}: " + ", ".join(reasons)
