"""All checks of one dataset: `inspect_data`.

In: preferences in any form, optionally evaluation data, a tokenizer and the settings of a run. Out: an `Inspection`
with all `Check`s, token statistics, and the first row as fastdpo reads it. A file is read one row at a time, and memory
does not grow with the length of texts. Refused with ValueError: rows that the forms refuse, and an empty file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

from fastdpo.data.rows.first_row import TRIED_ROWS, row_lines
from fastdpo.data.rows.report import TokenStats
from fastdpo.data.tokens.settings import TokenizationSettings
from fastdpo.inspection import checks
from fastdpo.inspection.checks import BAD, LOOK, Check
from fastdpo.inspection.findings import contradictions, cycles, duplicates, eval_prompts
from fastdpo.inspection.near import NearDuplicates, is_available
from fastdpo.inspection.source import TOKENIZED, ReadRow, Source
from fastdpo.inspection.survey import Survey
from fastdpo.inspection.tokens import TokenSurvey, survey_tokens

Progress = Callable[[Iterable[ReadRow], str], Iterable[ReadRow]]


def no_progress(rows: Iterable[ReadRow], what: str) -> Iterable[ReadRow]:
    """Rows without a progress bar."""
    return rows


@dataclass(frozen=True)
class Inspection:
    """The results of all checks."""

    name: str  # of the data
    checks: tuple[Check, ...]
    tokens: dict[str, TokenStats] = field(default_factory=dict)  # prompt, chosen, rejected; only with a tokenizer
    first_row: tuple[tuple[str, str], ...] = ()  # (role, text) of the first usable row
    unit: str = "characters"  # of `lengths`; "tokens" with a tokenizer
    lengths: Mapping[str, Sequence[int]] = field(default_factory=dict, repr=False)  # chosen, rejected: of each pair
    source: Source | None = field(default=None, repr=False)  # for reading examples again
    eval_source: Source | None = field(default=None, repr=False)

    @property
    def verdict(self) -> str:
        """The worst verdict of all checks."""
        verdicts = {check.verdict for check in self.checks}
        return BAD if BAD in verdicts else LOOK if LOOK in verdicts else checks.OK

    def check(self, name: str) -> Check:
        """The check with this name.

        Raises:
            ValueError: there is no such check.
        """
        for check in self.checks:
            if check.name == name:
                return check
        raise ValueError(f"name must be one of {[check.name for check in self.checks]}, got {name!r}")

    def as_dict(self) -> dict[str, Any]:
        """The inspection as a dict for JSON."""
        return {
            "data": self.name,
            "verdict": self.verdict,
            "checks": [asdict(check) for check in self.checks],
            "tokens": {name: asdict(stats) for name, stats in self.tokens.items()},
            "first_row": [list(line) for line in self.first_row],
        }


def inspect_data(
    data: Any,
    *,
    eval_data: Any = None,
    tokenizer: Any = None,
    settings: TokenizationSettings | None = None,
    split: str = "train",
    eval_split: str = "test",
    config_name: str | None = None,
    look_for_near: bool = True,
    progress: Progress = no_progress,
) -> Inspection:
    """Checks preference data before training.

    Args:
        data: a path or name, a Dataset or a list of dicts, in any form of preferences.
        eval_data: evaluation data. Its prompts should not be in `data`.
        tokenizer: of the model to be trained. Without it, the checks of tokens are skipped.
        settings: dataset_format, columns, max_length and other settings of the later run.
        split, eval_split, config_name: of folders and published datasets.
        look_for_near: whether to look for near duplicates if datasketch is installed. This takes most of the time.
        progress: wraps the rows of each pass; its second argument names the pass.
    Raises:
        ValueError: the data has no row or no known form, or the tokenizer lacks a chat template that rows need.
    """
    settings = settings or TokenizationSettings()
    source = Source(data, settings, split=split, config_name=config_name)
    near = NearDuplicates() if look_for_near and is_available() else None
    survey = read_survey(source, near, progress, "reading")
    eval_source = evaluated = None
    if eval_data is not None:
        eval_config = config_of_eval(data, eval_data, config_name)
        eval_source = Source(eval_data, settings, split=eval_split, config_name=eval_config)
        evaluated = read_survey(eval_source, None, progress, "reading evaluation data")
    tokens = None
    if tokenizer is not None:
        tokens = survey_tokens(source, tokenizer, settings, lambda rows: progress(rows, "tokenizing"))
    found = _without_tokens(survey, evaluated, near, settings, look_for_near, tokens)
    if tokens is not None:
        found += _of_tokens(survey, tokens, settings)
    found.append(checks.check_savings(survey, tokens))
    lengths = survey.pair_lengths() if tokens is None else (tokens.chosen, tokens.rejected)
    return Inspection(
        name=source.name,
        checks=tuple(found),
        tokens=tokens.stats() if tokens is not None else {},
        first_row=row_lines(islice(source.examples(), TRIED_ROWS), settings, is_sft=False),
        unit=survey.unit if tokens is None else "tokens",
        lengths=dict(zip(("chosen", "rejected"), lengths, strict=True)),
        source=source,
        eval_source=eval_source,
    )


def read_survey(source: Source, near: NearDuplicates | None, progress: Progress, what: str) -> Survey:
    """The survey of all rows. Rows that are not exact duplicates are also compared for near duplicates."""
    survey = Survey()
    seen: set[tuple[int, frozenset[tuple[int, int]]]] = set()
    for read in progress(source.rows(), what):
        facts = survey.add(read)
        if near is None or facts is None or read.form == TOKENIZED:
            continue
        key = (facts.prompt, frozenset(facts.edges))
        if key not in seen:
            seen.add(key)
            near.add(read)
    return survey


def _without_tokens(
    survey: Survey,
    evaluated: Survey | None,
    near: NearDuplicates | None,
    settings: TokenizationSettings,
    look_for_near: bool,
    tokens: TokenSurvey | None,
) -> list[Check]:
    rows = survey.rows
    repeats = eval_prompts(survey, evaluated) if evaluated is not None else {}
    counts: tuple[int, int, Any] = (survey.num_kept, survey.num_pairs, survey.dropped)
    lengths, unit = survey.pair_lengths(), survey.unit
    if tokens is not None:  # tokenization finds more reasons to drop a row, and gives the lengths in tokens
        counts = (tokens.num_kept, tokens.num_pairs, tokens.dropped)
        lengths, unit = (tokens.chosen, tokens.rejected), "tokens"
    found = [
        checks.check_form(survey, settings.dataset_format),
        checks.check_rows(survey.num_rows, *counts),
        checks.check_duplicates(survey, duplicates(rows)),
        checks.check_near_duplicates(survey, near.found if near is not None else None),
        checks.check_equal_answers(survey),
        checks.check_contradictions(survey, contradictions(rows)),
        checks.check_cycles(survey, cycles(rows)),
        checks.check_eval_prompts(survey, evaluated, repeats),
        checks.check_length_bias(rows, lengths, unit),
    ]
    if not look_for_near:
        found = [check for check in found if check.name != "near duplicates"]
    return found


def _of_tokens(survey: Survey, tokens: TokenSurvey, settings: TokenizationSettings) -> list[Check]:
    num_rows = survey.num_rows
    return [
        checks.check_one_side_cut(tokens, settings),
        checks.check_ends_cut(tokens, settings),
        checks.check_special_tokens(tokens, num_rows),
        checks.check_lost_content(tokens, num_rows),
        checks.check_prompt_ends(tokens, num_rows),
        checks.check_chat_template(tokens, num_rows),
    ]


def config_of_eval(data: Any, eval_data: Any, config_name: str | None) -> str | None:
    """The configuration of the evaluation data: `config_name` if it is the same published dataset as the data."""
    are_names = all(isinstance(item, (str, os.PathLike)) for item in (data, eval_data))
    return config_name if are_names and str(data) == str(eval_data) else None
