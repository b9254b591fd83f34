"""Best of n: from several responses to a prompt, the one with the largest reward.

In: rows of `score`, and the texts that they score. Out: rows for supervised fine-tuning. Responses need no scores or
preferences of their own: `in_given_order` makes rows of them that `score` reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastdpo.data.forms.rankings import LISTS, LISTS_OF_NUMBERS
from fastdpo.rewards.scores import RowScores


def in_given_order(examples: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
    """Rows with a list of responses that nobody has scored, as rankings in the given order; None for other rows.

    The order stands in for preferences, which the form needs; nothing should be concluded from it.
    """
    rows = [dict(example) for example in examples]
    first = rows[0] if rows else {}
    name = next((name for name in LISTS if isinstance(first.get(name), list)), None)
    if name is None or any(column in first for column in (*LISTS_OF_NUMBERS, "chosen", "rejected")):
        return None
    if not all(isinstance(response, (str, list)) for response in first[name]):  # objects with scores of their own
        return None
    ordered = []
    for row in rows:
        responses = row.pop(name) or []
        ordered.append({**row, "responses": responses, "scores": [-float(place) for place in range(len(responses))]})
    return ordered


def best_row(scored: RowScores, prompt: Any, responses: Sequence[Any]) -> dict[str, Any]:
    """The prompt with its best response, a row for `fastdpo sft`."""
    reward = scored.rewards[scored.best]
    picked = {"prompt": prompt, "completion": responses[scored.best]}
    return {**picked, "reward": reward, "num_responses": len(responses)}
