"""What preparing a dataset did, in numbers (`DataReport`) and in words (`DataReport.lines`).

Row numbers count from 0, in the order of the dataset.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

SHOWN_ROWS = 8  # row numbers per reason in the text; the report itself holds all


@dataclass(frozen=True)
class TokenStats:
    """Distribution of a number of tokens over the kept rows."""

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
    """What became of the rows of one dataset."""

    kind: str  # what a row is: "pairs" or "examples"
    num_rows: int
    num_kept: int
    dropped: dict[str, tuple[int, ...]] = field(default_factory=dict)  # reason -> rows
    num_truncated: int = 0  # kept rows that lost tokens to max_prompt_length or max_length
    num_merged_boundary: int = 0  # kept rows whose prompt ends in tokens that merge with the response
    tokens: dict[str, TokenStats] = field(
        default_factory=dict
    )  # "prompt", "chosen", "rejected"; SFT "prompt", "response"

    @property
    def num_dropped(self) -> int:
        return self.num_rows - self.num_kept

    def lines(self) -> list[str]:
        """The report for people: rows kept, dropped rows by reason, what was cut, token statistics."""
        lines = [f"kept {self.num_kept} of {self.num_rows} {self.kind}{self._dropped_text()}"]
        if self.num_truncated:
            lines.append(f"truncated {self.num_truncated} {self.kind}")
        if self.num_merged_boundary:
            lines.append(
                f"moved the prompt's last tokens to the response in {self.num_merged_boundary} {self.kind}, "
                "where prompt and response are tokenized differently together than apart"
            )
        if self.tokens:
            lines.append(f"{'tokens':<10}{'mean':>9}{'median':>9}{'p95':>7}{'max':>7}{'total':>11}")
        for name, stats in self.tokens.items():
            row = f"{stats.mean:>9.1f}{stats.median:>9.1f}{stats.p95:>7}{stats.max:>7}{stats.total:>11}"
            lines.append(f"{name:<10}{row}")
        return lines

    def _dropped_text(self) -> str:
        if not self.dropped:
            return ""
        reasons = []
        for reason, rows in sorted(self.dropped.items(), key=lambda item: -len(item[1])):
            shown = ", ".join(map(str, rows[:SHOWN_ROWS])) + (", ..." if len(rows) > SHOWN_ROWS else "")
            reasons.append(f"{reason} ({len(rows)}: {'row' if len(rows) == 1 else 'rows'} {shown})")
        return f"; dropped {self.num_dropped}: " + ", ".join(reasons)
