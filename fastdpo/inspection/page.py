"""The HTML page of an inspection: verdicts, statistics, and example rows for each finding.

In: an `Inspection`. Out: one self-contained file. Example rows are read from the data again. Without matplotlib the
page has no plot of lengths, and says so.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from fastdpo.inspection.checks import LOOK, OK, SKIPPED, Check
from fastdpo.inspection.inspect import Inspection
from fastdpo.inspection.source import ReadRow
from fastdpo.inspection.survey import Part, num_characters, text_of
from fastdpo.inspection.thresholds import LENGTH_BAD, LENGTH_LOOK, LIMITS
from fastdpo.report.html import write_report
from fastdpo.report.plots import length_histogram
from fastdpo.report.sections import Figure, Response, Sample, SampleList, Section, Table, Text

SHOWN_CHARACTERS = 600  # of a prompt or an answer: its start and its end
SHOWN_ANSWERS = 6
ADVICE = {OK: "This data is ready for training.", LOOK: "Look at the marked checks before training."}


def write_data_page(path: str | os.PathLike[str], inspection: Inspection, *, num_examples: int = 5) -> Path:
    """Writes the page and returns its path.

    Args:
        num_examples: number of examples for each check that is not ok.
    """
    shown = [check for check in inspection.checks if check.examples and check.verdict not in (OK, SKIPPED)]
    rows = _read(inspection, shown, num_examples)
    advice = ADVICE.get(inspection.verdict, "Fix the bad checks before training.")
    sections: list[Section] = [
        Text("Verdict", [f"{inspection.verdict.capitalize()}. {advice}"]),
        Table(
            "Checks",
            ("Check", "Verdict", "What was found"),
            [[check.name, check.verdict, _with_remedy(check)] for check in inspection.checks],
            is_prose=True,
        ),
        _lengths(inspection),
    ]
    if inspection.tokens:
        names = ("mean", "median", "p95", "max", "total")
        figures = [
            [name, f"{s.mean:,.1f}", f"{s.median:,.1f}", f"{s.p95:,}", f"{s.max:,}", f"{s.total:,}"]
            for name, s in inspection.tokens.items()
        ]
        sections.append(Table("Tokens", ("", *names), figures, note="After truncation, as in training."))
    if inspection.first_row:
        lines = [list(line) for line in inspection.first_row]
        sections.append(Table("The first row, as fastdpo reads it", (), lines, is_prose=True))
    sections += [_examples(check, rows, num_examples) for check in shown]
    sections.append(_thresholds())
    return write_report(path, "Preference data", sections, subtitle=inspection.name)


def _read(inspection: Inspection, shown: Iterable[Check], num_examples: int) -> dict[tuple[str, int], ReadRow]:
    """The example rows, by source ("row" for the data, "evaluation row" for the evaluation data) and number."""
    numbers: dict[str, set[int]] = {"row": set(), "evaluation row": set()}
    for check in shown:
        numbers["row"].update(number for rows in check.examples[:num_examples] for number in rows)
        numbers["evaluation row"].update(check.eval_rows[:num_examples])
    found: dict[tuple[str, int], ReadRow] = {}
    for what, source in (("row", inspection.source), ("evaluation row", inspection.eval_source)):
        if source is not None:
            found |= {(what, number): row for number, row in source.pick(numbers[what]).items()}
    return found


def _examples(check: Check, rows: Mapping[tuple[str, int], ReadRow], num_examples: int) -> SampleList:
    samples = []
    for position, numbers in enumerate(check.examples[:num_examples]):
        keys = [("row", number) for number in numbers]
        if position < len(check.eval_rows):
            keys.append(("evaluation row", check.eval_rows[position]))
        samples += [_sample(*key, rows[key]) for key in keys if key in rows]
    return SampleList(check.name.capitalize(), samples, "Characters", note=_with_remedy(check), name_column="Answer")


def _with_remedy(check: Check) -> str:
    return f"{check.finding}. {check.remedy}" if check.remedy else check.finding


def _sample(what: str, number: int, read: ReadRow) -> Sample:
    if read.row is None:
        return Sample(f"{what} {number}: {read.reason}", [Response("whole row", _short(str(dict(read.example))), "")])
    better = {chosen for chosen, _ in read.row.preferences}
    worse = {rejected for _, rejected in read.row.preferences}
    responses = []
    for index, response in enumerate(read.row.responses[:SHOWN_ANSWERS]):
        name = "chosen" if index not in worse else "rejected" if index not in better else "between"
        responses.append(Response(name, _short(text_of(response)), f"{num_characters(response):,}"))
    return Sample(f"{what} {number}: {_short(_dialogue(read.row.prompt))}", responses)


def _dialogue(part: Part) -> str:
    """The text, with roles if there are several messages."""
    if isinstance(part, str) or len(part) == 1:
        return text_of(part)
    return "\n".join(f"{message['role']}: {text_of([message])}" for message in part)


def _short(text: str) -> str:
    half = SHOWN_CHARACTERS // 2
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:half]} ... {text[-half:]}"


def _lengths(inspection: Inspection) -> Section:
    title, lengths = "Length of answers", {name: values for name, values in inspection.lengths.items() if values}
    if not lengths:
        return Text(title, ["There is no usable pair."])
    if importlib.util.find_spec("matplotlib") is None:
        return Text(title, ['No plot: matplotlib is missing: pip install "fastdpo[plots]".'])
    figure = length_histogram(lengths, inspection.unit)
    return Figure(title, figure, alt="Histogram of the lengths of chosen and rejected answers")


def _thresholds() -> Table:
    rows = [[name, _percent(limit.look), _percent(limit.bad), limit.reason] for name, limit in LIMITS.items()]
    rows.append(
        [
            "length bias",
            _percent(LENGTH_LOOK),
            _percent(LENGTH_BAD),
            "The share of pairs whose longer answer is on one side. Its whole 95 % interval must lie above the limit.",
        ]
    )
    return Table("When a check is not ok", ("Check", "Look above", "Bad above", "Why"), rows, is_prose=True)


def _percent(share: float | None) -> str:
    return "never" if share is None else f"{share:.0%}"
