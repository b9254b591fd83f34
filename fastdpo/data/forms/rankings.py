"""Several answers to a prompt, each with a score, or with a rank (the lowest rank is the best).

In: `Cells` with a list of answers and a list of scores or ranks, or with a list of objects that hold both. Out: a
`PreferenceRow`, one group. Refused with BadRow: lists of different length, a prompt whose answers are all equally good.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastdpo.data.forms.answers import Answer, answered, one_answer
from fastdpo.data.forms.columns import Cells, is_filled
from fastdpo.data.forms.context import read_context
from fastdpo.data.forms.messages import is_empty
from fastdpo.data.forms.names import plain_name
from fastdpo.data.values import BadRow
from fastdpo.types import Message, PreferenceRow

LISTS = ("responses", "completions", "answers", "outputs", "candidates", "generations", "all_responses")
SCORES = ("scores", "score", "rewards", "reward", "ratings", "rating", "overall_score")
RANKS = ("ranks", "rank", "ranking")  # from the best, 0 or 1, upwards
LISTS_OF_NUMBERS = ("scores", "rewards", "ratings", "ranks", "all_scores")
TEXTS = ("response", "completion", "answer", "output", "candidate", "generation", "messages", "content", "text")


def ranked(cells: Cells) -> PreferenceRow:
    """A prompt with any number of responses, each with a score or rank: one group, see `ranked_row`."""
    responses, scores = _ranked_answers(cells)
    context = read_context(cells)
    kept = [(one_answer(answer), score) for answer, score in zip(responses, scores, strict=True) if is_filled(answer)]
    if not kept:
        raise BadRow("no response is better than another")
    prompt, answers = answered(context, [answer for answer, _ in kept])
    return ranked_row(prompt, answers, [score for _, score in kept])


def ranked_row(prompt: str | list[Message], responses: Sequence[Answer], scores: Sequence[Any]) -> PreferenceRow:
    """The group of a prompt and its responses, best first; each response is preferred to all with a lower score.

    Responses that are empty, have no score or repeat a better one are dropped. Equal scores make no pair.

    Raises:
        BadRow: no response is better than another.
    """
    known = [(float(score), response) for response, score in zip(responses, scores, strict=True) if is_number(score)]
    known.sort(key=lambda pair: -pair[0])  # stable: equal scores stay in the order of the dataset
    kept: list[tuple[float, Any]] = []
    for score, response in known:
        if not is_empty(response) and all(response != other for _, other in kept):
            kept.append((score, response))
    pairs = [(i, j) for i in range(len(kept)) for j in range(i + 1, len(kept)) if kept[i][0] > kept[j][0]]
    if not pairs:
        raise BadRow("no response is better than another")
    return PreferenceRow(prompt, tuple(response for _, response in kept), tuple(pairs))


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def has_ranking(cells: Cells) -> bool:
    """Whether a column lists objects of answer and rank or score, or two columns list answers and ranks or scores."""
    name = _first(cells, LISTS)
    if name is None:
        return False
    if _first(cells, LISTS_OF_NUMBERS) is not None:
        return True
    value = cells.peek(name)
    if not isinstance(value, list) or not value:
        return value is None or value == []
    first = value[0]
    return isinstance(first, Mapping) and _key(first, TEXTS) is not None and _key(first, (*SCORES, *RANKS)) is not None


def _ranked_answers(cells: Cells) -> tuple[list[Any], list[Any]]:
    name = _first(cells, LISTS)
    responses = None if name is None else cells[name]
    column = _first(cells, LISTS_OF_NUMBERS)
    if column is not None:
        scores = cells[column]
        if not isinstance(responses, list) or not isinstance(scores, list) or len(responses) != len(scores):
            raise BadRow("responses and scores are not lists of equal length")
        return responses, _as_scores(scores, column)
    if not isinstance(responses, list) or not all(isinstance(item, Mapping) for item in responses):
        raise BadRow("responses and scores are not lists of equal length")
    answers, scores = [], []
    for item in responses:
        text, score = _key(item, TEXTS), _key(item, (*SCORES, *RANKS))
        answers.append(None if text is None else item[text])
        scores += [None] if score is None else _as_scores([item[score]], score)
    return answers, scores


def _as_scores(values: list[Any], name: str) -> list[Any]:
    """Ranks as negated numbers, so that more is better."""
    is_rank = plain_name(name) in RANKS
    return [-value if is_rank and is_number(value) else value for value in values]


def _first(cells: Cells, names: Sequence[str]) -> str | None:
    """The first of these columns that holds a list, else the first that exists."""
    found = [name for name in names if name in cells]
    return next((name for name in found if isinstance(cells.peek(name), list)), found[0] if found else None)


def _key(item: Mapping[str, Any], names: Sequence[str]) -> str | None:
    return next((name for name in names if item.get(name) is not None), None)
