"""Removes rows with faults from a dataset: `clean_data`.

In: the arguments of `inspect_data`, and the faults that remove a row. Out: a JSON Lines file with the remaining rows,
unchanged (trees and single answers become ranked rows), and one with a line for each removed row: its number, the fault
and the row. Both files appear complete or not at all. Refused with ValueError: unknown faults, faults that need a
tokenizer or evaluation data if there is none, and data in which every row has a fault.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastdpo.data.tokens.settings import TokenizationSettings
from fastdpo.inspection.findings import contradictions, cycles, cyclic_rows, duplicates, eval_prompts, outvoted_rows
from fastdpo.inspection.inspect import Progress, config_of_eval, no_progress, read_survey
from fastdpo.inspection.near import NearDuplicates, is_available
from fastdpo.inspection.output import check_output, json_lines
from fastdpo.inspection.source import Source
from fastdpo.inspection.survey import Facts, Survey
from fastdpo.inspection.tokens import TokenSurvey, survey_tokens

DEFAULT_FAULTS = ("unusable", "duplicates", "contradictions", "cycles")  # and eval_prompts, with evaluation data


@dataclass(frozen=True)
class Cleaned:
    """The written files, and the numbers of rows."""

    out: Path
    log: Path
    num_rows: int
    num_kept: int
    removed: dict[str, int] = field(default_factory=dict)  # fault -> rows


def clean_data(
    data: Any,
    out: str | os.PathLike[str],
    *,
    log: str | os.PathLike[str] | None = None,
    remove: Sequence[str] | None = None,
    eval_data: Any = None,
    tokenizer: Any = None,
    settings: TokenizationSettings | None = None,
    split: str = "train",
    eval_split: str = "test",
    config_name: str | None = None,
    progress: Progress = no_progress,
) -> Cleaned:
    """Writes the rows of `data` without faults to `out`.

    Args:
        log: the file for removed rows; by default `out` with the ending ".removed.jsonl".
        remove: names of FAULTS; by default DEFAULT_FAULTS, and eval_prompts if there is evaluation data.
        others: as for `inspect_data`.
    Raises:
        ValueError: see the module's docstring.
    """
    settings = settings or TokenizationSettings()
    target = check_output(out, data, eval_data)
    log_file = check_output(_log_name(target) if log is None else log, data, eval_data, name="log")
    if log_file.resolve() == target.resolve():
        raise ValueError(f"log must differ from out, got {os.fspath(log_file)!r} for both")
    faults = _checked(remove, eval_data, tokenizer)
    source = Source(data, settings, split=split, config_name=config_name)
    near = NearDuplicates() if "near_duplicates" in faults else None
    survey = read_survey(source, near, progress, "reading")
    evaluated = None
    if "eval_prompts" in faults:
        name = config_of_eval(data, eval_data, config_name)
        eval_source = Source(eval_data, settings, split=eval_split, config_name=name)
        evaluated = read_survey(eval_source, None, progress, "reading evaluation data")
    tokens = None
    if tokenizer is not None:
        tokens = survey_tokens(source, tokenizer, settings, lambda rows: progress(rows, "tokenizing"))
    reasons = _reasons(faults, _Evidence(survey, evaluated, near, tokens))
    if len(reasons) == survey.num_rows:
        raise ValueError(
            f"data must hold at least one row without a fault, got {survey.num_rows} rows with faults in {source.name}"
        )
    removed: dict[str, int] = {}
    with json_lines(target, log_file) as (write, write_log):
        for read in progress(source.rows(), "writing"):
            if read.number not in reasons:
                write(read.example)
                continue
            fault, detail = reasons[read.number]
            removed[fault] = removed.get(fault, 0) + 1
            write_log({"row": read.number, "fault": fault, "detail": detail, "removed": read.example})
    return Cleaned(target, log_file, survey.num_rows, survey.num_rows - len(reasons), removed)


def _log_name(target: Path) -> Path:
    stem = target.name[: target.name.lower().rindex(".ndjson" if ".ndjson" in target.name.lower() else ".jsonl")]
    return target.with_name(f"{stem}.removed.jsonl")


def _checked(remove: Sequence[str] | None, eval_data: Any, tokenizer: Any) -> tuple[str, ...]:
    if remove is None:
        return (*DEFAULT_FAULTS, *(("eval_prompts",) if eval_data is not None else ()))
    unknown = [name for name in remove if name not in FAULTS]
    if unknown or not remove:
        raise ValueError(f"remove must be names of {', '.join(FAULTS)}, got {', '.join(unknown) or 'none'}")
    if "eval_prompts" in remove and eval_data is None:
        raise ValueError("remove must not hold eval_prompts without evaluation data; give it with --eval FILE")
    needing = [name for name in remove if FAULTS[name].needs_tokenizer]
    if needing and tokenizer is None:
        raise ValueError(
            f"remove must not hold {needing[0]} without a tokenizer; name its model with --model FOLDER_OR_NAME"
        )
    if "near_duplicates" in remove and not is_available():
        raise ValueError('remove must not hold near_duplicates without datasketch: pip install "fastdpo[data]"')
    return tuple(remove)


@dataclass(frozen=True)
class _Evidence:
    """All findings about the rows."""

    survey: Survey
    evaluated: Survey | None = None
    near: NearDuplicates | None = None
    tokens: TokenSurvey | None = None


Rows = list[Facts]
Found = Iterator[tuple[int, str]]  # number of a row, and detail of its fault


def _reasons(faults: Sequence[str], evidence: _Evidence) -> dict[int, tuple[str, str]]:
    """Row to remove -> its first fault and a detail. Each fault is looked for only in rows without earlier faults."""
    reasons: dict[int, tuple[str, str]] = {}
    for fault in FAULTS.values():
        if fault.name in faults:
            rows = [row for row in evidence.survey.rows if row.number not in reasons]
            for number, detail in list(fault.find(evidence, rows)):
                reasons.setdefault(number, (fault.name, detail))
    return reasons


def _unusable(evidence: _Evidence, rows: Rows) -> Found:
    known = evidence.survey if evidence.tokens is None else evidence.tokens
    return ((number, reason) for reason, numbers in known.dropped.items() for number in numbers)


def _eval_prompts(evidence: _Evidence, rows: Rows) -> Found:
    assert evidence.evaluated is not None
    found = eval_prompts(evidence.survey, evidence.evaluated)
    return ((number, f"has the prompt of row {other} of the evaluation data") for number, other in found.items())


def _duplicates(evidence: _Evidence, rows: Rows) -> Found:
    return ((number, f"repeats row {first}") for number, first in duplicates(rows).items())


def _contradictions(evidence: _Evidence, rows: Rows) -> Found:
    """Counts the rows of each side over all rows, including removed ones, so that duplicates count too."""
    for number, one in outvoted_rows(rows, contradictions(evidence.survey.rows)).items():
        yield number, f"contradicted by {_numbers(one.others if number in one.rows else one.rows)}"


def _cycles(evidence: _Evidence, rows: Rows) -> Found:
    for number, cycle in cyclic_rows(rows, cycles(rows)).items():
        yield number, f"on the cycle of {_numbers(cycle.rows)}"


def _equal_answers(evidence: _Evidence, rows: Rows) -> Found:
    return ((row.number, "answers differ only in blanks or upper case") for row in rows if row.has_alike)


def _near_duplicates(evidence: _Evidence, rows: Rows) -> Found:
    """Keeps the first remaining row of each group of near duplicates."""
    assert evidence.near is not None
    stays: dict[int, int] = {}
    for row in rows:
        like = evidence.near.found.get(row.number, row.number)
        first = stays.setdefault(like, row.number)
        if first != row.number:
            yield row.number, f"like row {first}"


def _one_side_cut(evidence: _Evidence, rows: Rows) -> Found:
    assert evidence.tokens is not None
    return ((number, "only one answer is cut at max_length") for number in evidence.tokens.one_cut)


def _ends_cut(evidence: _Evidence, rows: Rows) -> Found:
    assert evidence.tokens is not None
    return ((number, "an answer is cut at max_length") for number in evidence.tokens.ends_cut)


def _special_tokens(evidence: _Evidence, rows: Rows) -> Found:
    assert evidence.tokens is not None
    return ((number, f"spells out {', '.join(names)}") for number, names in evidence.tokens.spelled.items())


def _lost_content(evidence: _Evidence, rows: Rows) -> Found:
    assert evidence.tokens is not None
    return ((number, f"loses {what}") for number, what in evidence.tokens.lost.items())


@dataclass(frozen=True)
class Fault:
    """A reason to remove rows."""

    name: str
    what: str  # the rows that have it
    find: Callable[[_Evidence, Rows], Found]
    needs_tokenizer: bool = False


# The order matters: a row is logged under its first fault.
FAULTS = {
    fault.name: fault
    for fault in (
        Fault("unusable", "rows that training cannot use", _unusable),
        Fault("eval_prompts", "rows whose prompt is in the evaluation data", _eval_prompts),
        Fault("duplicates", "rows that repeat an earlier one", _duplicates),
        Fault("contradictions", "rows contradicted by equally many or more rows", _contradictions),
        Fault("cycles", "rows whose preferences all lie on cycles", _cycles),
        Fault("equal_answers", "rows with a pair that differs only in blanks or upper case", _equal_answers),
        Fault("near_duplicates", "rows that nearly repeat an earlier one", _near_duplicates),
        Fault("one_side_cut", "rows in which only one answer loses its end", _one_side_cut, True),
        Fault("ends_cut", "rows in which an answer loses its end", _ends_cut, True),
        Fault("special_tokens", "rows whose text spells out special tokens", _special_tokens, True),
        Fault("lost_content", "rows that lose content in the template or tokenizer", _lost_content, True),
    )
}


def _numbers(rows: Sequence[int]) -> str:
    shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
    return f"row {shown}" if len(rows) == 1 else f"rows {shown}"
