"""The checks, one function each: they turn findings about the rows into a verdict, numbers and example rows.

In: a `Survey`, a `TokenSurvey`, or both. Out: a `Check`. `thresholds` holds the shares at which a verdict changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from statistics import fmean
from typing import Any

from fastdpo.data.rows.report import loss_lines
from fastdpo.data.tokens.notes import OPENS, PLAIN_TEXT, SPELLED
from fastdpo.data.tokens.settings import TokenizationSettings
from fastdpo.inspection.findings import Contradiction, Cycle
from fastdpo.inspection.survey import Facts, Survey
from fastdpo.inspection.thresholds import LENGTH_BAD, LENGTH_LOOK, LIMITS, NEAR_SIMILARITY
from fastdpo.inspection.tokens import BATCH_SIZE, TokenSurvey
from fastdpo.rewards.intervals import wilson

OK, LOOK, BAD, SKIPPED = "ok", "look", "bad", "skipped"
NUM_EXAMPLES = 20  # kept for each check; a page shows fewer


@dataclass(frozen=True)
class Check:
    """The result of one check."""

    name: str
    verdict: str  # "ok", "look", "bad"; "skipped" if the check is not possible
    finding: str  # one sentence
    numbers: Mapping[str, Any] = field(default_factory=dict)
    examples: tuple[tuple[int, ...], ...] = ()  # row numbers from 0; the rows of one example belong together
    remedy: str = ""  # what to do if the verdict is not ok
    eval_rows: tuple[int, ...] = ()  # for each example, the matching row of the evaluation data


def check_form(survey: Survey, dataset_format: str) -> Check:
    """The form of the rows, and the columns that nothing reads."""
    forms = dict(survey.forms.most_common())
    unread = list(survey.columns.unread)
    names = " and ".join(f"{name} ({count:,} rows)" if len(forms) > 1 else name for name, count in forms.items())
    finding = f"{names or 'none'}, {'by the columns' if dataset_format == 'auto' else 'as dataset_format says'}"
    if unread:
        finding += f"; not read: {', '.join(unread)}"
    verdict = BAD if not forms else LOOK if len(forms) > 1 else OK
    remedy = "The file mixes several forms: name one with --dataset_format, or split the file." if forms else ""
    return Check("form", verdict, finding, {"forms": forms, "unread": unread}, remedy=_unless_ok(verdict, remedy))


def check_rows(num_rows: int, num_kept: int, num_pairs: int, dropped: Mapping[str, Sequence[int]]) -> Check:
    """How many rows can be used, and why the others cannot."""
    share = (num_rows - num_kept) / num_rows
    by_reason = dict(sorted(((reason, len(rows)) for reason, rows in dropped.items()), key=lambda item: -item[1]))
    finding = f"{num_kept:,} of {num_rows:,} kept"
    if num_pairs != num_kept:
        finding += f", with {num_pairs:,} pairs"
    if by_reason:
        finding += "; dropped: " + ", ".join(f"{count:,} {reason}" for reason, count in by_reason.items())
    verdict = BAD if num_kept == 0 else LIMITS["rows"].verdict(share)
    return Check(
        "rows",
        verdict,
        finding,
        {"num_rows": num_rows, "num_kept": num_kept, "num_pairs": num_pairs, "dropped": by_reason},
        _examples((row,) for rows in dropped.values() for row in islice(rows, 5)),
        _unless_ok(
            verdict, "Training leaves these rows out: check --columns, and --max_length if prompts are too long."
        ),
    )


def check_duplicates(survey: Survey, repeats: Mapping[int, int]) -> Check:
    """Rows that repeat an earlier one in prompt, answers and preferences."""
    return _of_rows(
        "duplicates",
        len(repeats),
        survey.num_kept,
        "repeat an earlier row",
        _examples((first, row) for row, first in repeats.items()),
        "`fastdpo data clean` keeps the first of each.",
    )


def check_near_duplicates(survey: Survey, repeats: Mapping[int, int] | None) -> Check:
    """Rows whose prompt and answers are both similar to those of an earlier row; None if datasketch is missing."""
    if repeats is None:
        missing = 'needs datasketch, which is not installed: pip install "fastdpo[data]"'
        return Check("near duplicates", SKIPPED, missing)
    return _of_rows(
        "near duplicates",
        len(repeats),
        survey.num_kept,
        f"nearly repeat an earlier row (prompt and answers at least {NEAR_SIMILARITY:.0%} similar)",
        _examples((first, row) for row, first in repeats.items()),
        "Look at the examples. `fastdpo data clean --remove near_duplicates,...` keeps the first of each.",
    )


def check_equal_answers(survey: Survey) -> Check:
    """Pairs whose answers differ only in blanks and upper case."""
    rows = [row.number for row in survey.rows if row.has_alike]
    return _of_rows(
        "equal answers",
        len(rows),
        survey.num_kept,
        "have a pair that differs only in blanks or upper case",
        _examples((row,) for row in rows),
        "Such a pair teaches only spelling. `fastdpo data clean --remove equal_answers,...` leaves these rows out.",
    )


def check_contradictions(survey: Survey, found: Sequence[Contradiction]) -> Check:
    """The same two answers to a prompt, preferred both ways."""
    num_compared = len({(row.prompt, *sorted(edge)) for row in survey.rows for edge in row.edges})
    share = len(found) / num_compared if num_compared else 0.0
    verdict = LIMITS["contradictions"].verdict(share)
    finding = "none" if not found else f"{_of(len(found), num_compared)} compared answers are preferred both ways"
    numbers = {"num_contradictions": len(found), "num_compared": num_compared, "share": share}
    remedy = (
        "They cancel in the loss. `fastdpo data clean` keeps the side with more rows; if both have equally many, none."
    )
    examples = _examples(tuple(dict.fromkeys((one.rows[0], one.others[0]))) for one in found)
    return Check("contradictions", verdict, finding, numbers, examples, _unless_ok(verdict, remedy))


def check_cycles(survey: Survey, found: Sequence[Cycle]) -> Check:
    """Preferences over the answers to one prompt that form a cycle."""
    answers: dict[int, set[int]] = {}
    for row in survey.rows:
        answers.setdefault(row.prompt, set()).update(answer for edge in row.edges for answer in edge)
    num_prompts = sum(len(of_prompt) > 2 for of_prompt in answers.values())
    num_cyclic = len({cycle.prompt for cycle in found})
    share = num_cyclic / num_prompts if num_prompts else 0.0
    verdict = LIMITS["cycles"].verdict(share)
    if not num_prompts:
        finding = "none: no prompt has three answers"
    elif not found:
        finding = f"none in {num_prompts:,} prompts with three answers or more"
    else:
        shortest = min(len(cycle.answers) for cycle in found)
        finding = (
            f"{_of(num_cyclic, num_prompts)} prompts with three answers or more have one; the shortest has {shortest}"
        )
    numbers = {
        "num_cycles": len(found),
        "num_prompts_with_cycles": num_cyclic,
        "num_prompts": num_prompts,
        "share": share,
    }
    remedy = "No scores fit a cycle. `fastdpo data clean` removes rows whose preferences all lie on one."
    examples = _examples(tuple(dict.fromkeys(cycle.rows)) for cycle in found)
    return Check("cycles", verdict, finding, numbers, examples, _unless_ok(verdict, remedy))


def check_eval_prompts(survey: Survey, evaluated: Survey | None, found: Mapping[int, int]) -> Check:
    """Prompts that are in both training and evaluation data. `evaluated` is None if there is no evaluation data."""
    if evaluated is None:
        return Check("train and eval", SKIPPED, "no evaluation data: --eval FILE")
    num_prompts = len(evaluated.prompts)
    num_shared = sum(key in survey.prompts for key in evaluated.prompts)
    share = num_shared / num_prompts if num_prompts else 0.0
    verdict = LIMITS["train and eval"].verdict(share)
    finding = f"none of {num_prompts:,} prompts of the evaluation data is in the training data"
    if num_shared:
        finding = f"{_of(num_shared, num_prompts)} prompts of the evaluation data are in {len(found):,} training rows"
    numbers = {"num_shared": num_shared, "num_eval_prompts": num_prompts, "num_train_rows": len(found), "share": share}
    shown = list(islice(found.items(), NUM_EXAMPLES))
    return Check(
        "train and eval",
        verdict,
        finding,
        numbers,
        tuple((row,) for row, _ in shown),
        _unless_ok(verdict, "`fastdpo data clean --eval FILE` removes these rows from the training data."),
        tuple(row for _, row in shown),
    )


def check_length_bias(rows: Sequence[Facts], lengths: tuple[Sequence[int], Sequence[int]], unit: str) -> Check:
    """How often the chosen answer is the longer one.

    Args:
        lengths: of the chosen and of the rejected answer of each pair, in `unit`.
    """
    pairs = list(zip(*lengths, strict=True))
    longer = sum(chosen > rejected for chosen, rejected in pairs)
    shorter = sum(chosen < rejected for chosen, rejected in pairs)
    numbers: dict[str, Any] = {"num_longer": longer, "num_shorter": shorter, "num_equal": len(pairs) - longer - shorter}
    if not longer + shorter:
        return Check("length bias", OK, "no pair has answers of different length", {**numbers, "unit": unit})
    share = longer / (longer + shorter)
    low, high = wilson(longer, longer + shorter)
    nearest = low if low > 0.5 else 1 - high  # the end of the interval that is nearest to one half
    verdict = BAD if nearest > LENGTH_BAD else LOOK if nearest > LENGTH_LOOK else OK
    means = fmean(chosen for chosen, _ in pairs), fmean(rejected for _, rejected in pairs)
    finding = (
        f"chosen is longer in {share:.1%} of pairs (95 % interval {low:.1%} to {high:.1%}); means"
        f" {means[0]:,.0f} and {means[1]:,.0f} {unit}"
    )
    numbers |= {"share": share, "low": low, "high": high, "unit": unit}
    numbers |= {"mean_chosen": means[0], "mean_rejected": means[1]}
    examples: tuple[tuple[int, ...], ...] = ()
    if verdict != OK:  # the largest differences in the common direction
        sign = 1 if share > 0.5 else -1
        gaps = ((max(sign * (r.lengths[a] - r.lengths[b]) for a, b in r.pairs), r.number) for r in rows if r.pairs)
        examples = _examples((number,) for _, number in sorted(gaps, key=lambda gap: (-gap[0], gap[1]))[:NUM_EXAMPLES])
    remedy = "The model will learn length first: balance the pairs, or use a length-normalized loss (simpo, ld_alpha)."
    return Check("length bias", verdict, finding, numbers, examples, _unless_ok(verdict, remedy))


def check_one_side_cut(tokens: TokenSurvey, settings: TokenizationSettings) -> Check:
    """Pairs in which only one answer lost its end."""
    return _of_rows(
        "one side cut",
        len(tokens.one_cut),
        tokens.num_kept,
        f"lose the end of only one answer at max_length {settings.max_length}",
        _examples((row,) for row in tokens.one_cut),
        _longer(tokens, "Raise --max_length, or train with on_long_row='drop', to compare whole answers."),
    )


def check_ends_cut(tokens: TokenSurvey, settings: TokenizationSettings) -> Check:
    """Answers that lost their end, and with it the end-of-text token."""
    more = f" ({len(tokens.prompts_cut):,} rows lose part of the prompt)" if tokens.prompts_cut else ""
    check = _of_rows(
        "ends cut",
        len(tokens.ends_cut),
        tokens.num_kept,
        f"lose the end of an answer, and its EOS, at max_length {settings.max_length}",
        _examples((row,) for row in tokens.ends_cut),
        _longer(tokens, "The model never sees these answers stop."),
    )
    return Check(
        check.name,
        check.verdict,
        check.finding + more,
        {**check.numbers, "num_prompts_cut": len(tokens.prompts_cut)},
        check.examples,
        check.remedy,
    )


def check_special_tokens(tokens: TokenSurvey, num_rows: int) -> Check:
    """Rows whose text spells out special tokens of the tokenizer."""
    names = dict(tokens.names.most_common(8))
    num_control = len(tokens.spelled_as_tokens)
    words = f"spell out {', '.join(names)}" if names else "spell out a special token"
    if num_control:
        words += f", tokenized as a control token in {num_control:,} of them"
    elif names:
        words += ", tokenized as plain characters"
    return _of_rows(
        "special tokens",
        len(tokens.spelled),
        num_rows,
        words,
        _examples((row,) for row in tokens.spelled),
        "If the text already contains the chat template, give it as messages. If it contains stray markup, remove it.",
        {"names": names, "num_as_control_tokens": num_control},
    )


def check_lost_content(tokens: TokenSurvey, num_rows: int) -> Check:
    """Content that the chat template leaves out, such as thoughts, or that the tokenizer does not know."""
    lines = [line for line in loss_lines(tokens.notes, num_rows) if not line.startswith("the prompt alone")]
    share = len(tokens.lost) / num_rows
    verdict = LIMITS["lost content"].verdict(share)
    finding = "; ".join(lines) if lines else "none: the tokens hold the rows' whole content"
    kinds: dict[str, int] = {}
    for what in tokens.lost.values():
        kinds[what] = kinds.get(what, 0) + 1
    remedy = "Another --chat_template or chat_template_kwargs may keep it; on_lost_content='drop' leaves such rows out."
    examples = _examples((row,) for row in tokens.lost)
    numbers = {"num_found": len(tokens.lost), "num_rows": num_rows, "share": share, "what": kinds}
    return Check("lost content", verdict, finding, numbers, examples, _unless_ok(verdict, remedy))


def check_prompt_ends(tokens: TokenSurvey, num_rows: int) -> Check:
    """Prompts that end in other tokens in generation than before an answer in training."""
    found = tokens.notes.num_rows(OPENS)
    ends = tokens.notes.whats(OPENS)
    words = (
        f"end in {ends[0]!r} in generation, but not before an answer" if ends else "end in other tokens in generation"
    )
    remedy = "Another --chat_template, or chat_template_kwargs such as enable_thinking, may render both the same way."
    return _of_rows("prompt ends", found, num_rows, words, _examples((r,) for r in tokens.rows_of_note[OPENS]), remedy)


def check_chat_template(tokens: TokenSurvey, num_rows: int) -> Check:
    """Plain text for a model with a chat template, which text is tokenized without."""
    found = tokens.notes.num_rows(PLAIN_TEXT) - tokens.notes.num_rows(SPELLED)  # spelled out: it may hold the template
    remedy = (
        "A chat model needs messages: fastdpo data convert FILE -o OUT writes them. A base model may keep the text."
    )
    words = "are plain text, which is tokenized without the model's chat template"
    examples = _examples((row,) for row in tokens.rows_of_note[PLAIN_TEXT])
    return _of_rows("chat template", found, num_rows, words, examples if found else (), remedy)


def check_savings(survey: Survey, tokens: TokenSurvey | None) -> Check:
    """The tokens that packing and shared prompts save on this data; without a tokenizer, the characters."""
    if tokens is None:
        raw = sum(row.num_raw for row in survey.rows)
        unique = raw - sum(row.num_shared for row in survey.rows)
        finding = f"sharing prompts computes {unique:,} of {raw:,} {survey.unit}" + _saved(unique, raw)
        numbers: dict[str, Any] = {"unit": survey.unit, "raw": raw, "unique": unique}
        return Check("savings", OK, finding, {**numbers, "saved": _share_saved(unique, raw)})
    raw, unique, padded = tokens.num_raw, tokens.num_unique, tokens.num_padded
    finding = (
        f"packing and sharing compute {unique:,} tokens instead of {raw:,}{_saved(unique, raw)}, or {padded:,} padded"
        f" in batches of {BATCH_SIZE}{_saved(unique, padded)}"
    )
    together = tokens.num_together
    if unique - together > unique / 100:
        finding += f"; {together:,} with --regroup_dataset"
    numbers = {"unit": "tokens", "raw": raw, "unique": unique, "padded": padded, "regrouped": together}
    return Check("savings", OK, finding, {**numbers, "saved": _share_saved(unique, raw)})


def _of_rows(
    name: str,
    num_found: int,
    num_rows: int,
    words: str,
    examples: tuple[tuple[int, ...], ...],
    remedy: str,
    numbers: Mapping[str, Any] | None = None,
) -> Check:
    """The result of a check that counts rows."""
    share = num_found / num_rows if num_rows else 0.0
    verdict = LIMITS[name].verdict(share)
    finding = f"{_of(num_found, num_rows)} rows {words}" if num_found else "none"
    counted = {"num_found": num_found, "num_rows": num_rows, "share": share, **(numbers or {})}
    return Check(name, verdict, finding, counted, examples, _unless_ok(verdict, remedy))


def _of(count: int, total: int) -> str:
    return f"{count:,} of {total:,} ({count / total:.1%})"


def _unless_ok(verdict: str, remedy: str) -> str:
    return "" if verdict == OK else remedy


def _examples(rows: Iterable[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    return tuple(islice(rows, NUM_EXAMPLES))


def _longer(tokens: TokenSurvey, otherwise: str) -> str:
    """The remedy, and the length that keeps 99 % of the rows whole."""
    if not tokens.longest:
        return otherwise
    needed = sorted(tokens.longest)[math.ceil(0.99 * len(tokens.longest)) - 1]
    return f"{otherwise} --max_length {needed} keeps 99 % of the rows whole."


def _saved(unique: int, raw: int) -> str:
    return f" ({_share_saved(unique, raw):.0%} less)"


def _share_saved(unique: int, raw: int) -> float:
    return 1 - unique / raw if raw else 0.0
