"""The judge of this recipe: `--judge recipes.smollm2_rounds.judge:agreement`.

It scores an answer by the words that it shares with the data's own answer to the instruction (F1, as SQuAD counts it),
so that answers are better if they are right and brief.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

_ANSWERS: dict[str, str] = {}  # by instruction


def learn(answers: Mapping[str, str]) -> None:
    """Sets the right answers, by instruction. The judge needs them before it scores."""
    _ANSWERS.clear()
    _ANSWERS.update(answers)


def agreement(prompts: Sequence[Any], completions: Sequence[Any], **kwargs: Any) -> list[float | None]:
    """F1 of the words of each answer and of the right one, in [0, 1]; None for an unknown instruction."""
    found: list[float | None] = []
    for prompt, said in zip(prompts, completions, strict=True):
        asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        text = said if isinstance(said, str) else said[-1]["content"]
        found.append(f1(text, _ANSWERS[asked]) if asked in _ANSWERS else None)
    return found


def f1(answer: str, right: str) -> float:
    """2 * shared words / all words of both; words in lower case, each as often as it occurs."""
    ours, theirs = (Counter(re.findall(r"\w+", text.lower())) for text in (answer, right))
    total = ours.total() + theirs.total()
    return 2 * (ours & theirs).total() / total if total else 0.0
