"""The message about dropped rows: one line, or a prominent notice if most rows are dropped.

In: the report of a dataset and its settings. Out: text.
"""

from __future__ import annotations

from typing import Any

from fastdpo.data.prepare import Report

_SHARE_THAT_STANDS_OUT = 0.5


def lost_rows_text(report: Report, name: str, args: Any) -> str:
    """The first line of the report; in a frame and with remedies if more than half of the rows are dropped."""
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
    longer = f"raise max_length, now {args.max_length}, or set max_prompt_length to leave space for responses"
    return {
        "prompt fills max_length": longer,
        "chosen equals rejected after truncation": longer,
        "chosen equals rejected": "check that the columns being read hold the two answers",
        "empty response": "check that the columns being read hold the answers",
        "empty prompt": "check that the column being read holds the prompt",
    }
