"""What is said of rows that a run leaves out: one line, and a notice that cannot be overlooked where most are lost.

In: the report of a dataset and the settings it was made with. Out: text.
"""

from __future__ import annotations

from typing import Any

from fastdpo.data.prepare import Report

_SHARE_THAT_STANDS_OUT = 0.5


def lost_rows_text(report: Report, name: str, args: Any) -> str:
    """The first line of the report, framed and with remedies where more than half of the rows are gone."""
    first = report.lines()[0]
    if report.num_kept >= _SHARE_THAT_STANDS_OUT * report.num_rows:
        return f"{name} dataset: {first}"
    title = f"MOST ROWS ARE LOST: {report.num_rows - report.num_kept} of {report.num_rows} of the {name} dataset"
    lines = [
        title,
        first,
        *(f"{reason}: {what}" for reason, what in _remedies(args).items() if reason in report.dropped),
    ]
    rule = "!" * 100
    return "\n".join(["", rule, *(f"!! {line}" for line in lines), rule])


def _remedies(args: Any) -> dict[str, str]:
    longer = f"raise max_length, now {args.max_length}, or set max_prompt_length to leave responses room"
    return {
        "prompt fills max_length": longer,
        "chosen equals rejected after truncation": longer,
        "chosen equals rejected": "compare the columns that are read with those that hold the two answers",
        "empty response": "see whether the answers stand in the columns that are read",
        "empty prompt": "see whether the prompt stands in the column that is read",
    }
