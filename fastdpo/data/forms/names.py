"""Column names: the names of each kind of column that is read, and the words that mark a column as metadata.

The names come from the trainers (TRL, Axolotl, LLaMA-Factory, ms-swift, NeMo-RL, OpenAI, OpenPipe) and from published
datasets. A text column with a name in neither table is an error: for a name missing here, the user adds one
`--columns`, and no content is dropped silently.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import lru_cache


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _sides(*patterns: str, sides: tuple[str, ...]) -> tuple[str, ...]:
    """The possible column names for one side of a preference, the plain name first."""
    return tuple(pattern.format(side) for side in sides for pattern in patterns)


_ANSWERS = (
    *("{}", "{}_response", "{}_output", "{}_answer", "{}_completion", "{}_message", "{}_messages"),
    *("{}_conversation", "{}_conversations", "{}_text", "{}_responses", "response_{}", "answer_{}"),
)

# Names in lower case, words joined by "_"; of several columns of one kind the first in this order is read.
KINDS: dict[str, tuple[str, ...]] = {
    "system": (
        *("system", "system_prompt", "system_message", "system_instruction", "system_instructions", "sys"),
        *("sys_prompt", "systemprompt", "system_text"),
    ),
    "history": (
        *("history", "chat_history", "conversation_history", "dialogue_history", "dialog_history"),
        *("message_history", "previous_turns", "past_turns", "previous_messages", "prior_turns"),
    ),
    "context": (
        *("context", "messages", "conversations", "conversation", "dialogue", "dialog", "chat"),
        *("input_messages", "prompt_messages", "context_messages", "transcript"),
    ),
    "prompt": ("prompt", "prompts", "prompt_text"),
    "instruction": ("instruction",),
    "question": (
        *("question", "query", "input", "user", "user_prompt", "user_message", "user_input", "user_query"),
        *("human", "problem", "request", "inputs"),
    ),
    "chosen": _sides(*_ANSWERS, sides=("chosen", "preferred", "accepted", "winning", "winner", "better")),
    "rejected": _sides(
        *_ANSWERS,
        sides=("rejected", "non_preferred", "nonpreferred", "dispreferred", "unpreferred", "losing", "loser", "worse"),
    ),
    "response": ("response", "output", "completion", "answer", "target", "model_output", "model_response"),
    "tools": ("tools", "functions"),
}
PROMPT_KINDS = ("system", "history", "context", "prompt", "instruction", "question")

# The last words of names of metadata columns: _ABOUT for any content, _LABELS for content of a few words, _TASKS for a
# single word (a longer task may be the prompt).
_ABOUT = _words(
    """id ids idx index uid uuid guid hash md5 sha source sources origin dataset datasets url urls uri link links path
    file filename model models policy policies generator generators judge judges annotator annotators annotation
    annotations worker workers author authors labeler labelers score scores rating ratings rank ranks ranking rankings
    reward rewards logp logps logprob logprobs margin margins length lengths tokens count counts sampling date time
    datetime timestamp timestamps tstamp created updated version license licence metadata meta extra stats statistics
    confidence agreement probability prob weight weights toxicity moderation parameters hyperparameters rationale
    rationales critique critiques justification"""
)
_LABELS = _words(
    """split subset config domain domains category categories topic topics subreddit tag tags type types kind class
    language languages lang langs locale country status quality difficulty level complexity safety harm severity flag
    flags method strategy principle principles criterion criteria label labels preference preferences winner batch seed
    temperature strength at info turn turns anony pii num likes votes upvotes"""
)
_TASKS = _words("task tasks")
_LABEL_WORDS = 8
_ABOUT_WHOLE = _words("tool_choice parallel_tool_calls stream stop top_p n")
_SIDE_WORDS = _words("a b c d w l j k 0 1 2 3 4 chosen rejected preferred name names avg mean value values str")
IGNORE = "ignore"  # key of the setting `columns` that lists the columns to leave unread


def plain_name(name: str) -> str:
    """A column's name in lower case, its words joined by "_": "Chosen Response" is chosen_response."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    return re.sub(r"[^\w.]+|_+", "_", spaced).strip("_").lower()


def is_metadata(name: str, texts: Sequence[str]) -> bool:
    """Whether a column is metadata, judged by its name and the length of its text: chosen_model, score_a."""
    most_words = _words_of_metadata(name)
    return all(len(text.split()) <= most_words for text in texts)


@lru_cache(maxsize=1024)
def _words_of_metadata(name: str) -> float:
    """Largest number of words for which a text column of this name counts as metadata; 0 if the name never does."""
    plain = plain_name(name).rsplit(".", 1)[-1]
    words = plain.split("_")
    while len(words) > 1 and words[-1] in _SIDE_WORDS:
        words.pop()
    if plain in _ABOUT_WHOLE or words[-1] in _ABOUT:
        return math.inf
    return _LABEL_WORDS if words[-1] in _LABELS else float(words[-1] in _TASKS)


@lru_cache(maxsize=1024)
def names_by_kind(columns: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    by_name: dict[str, str] = {}
    for column in columns:
        by_name.setdefault(plain_name(column), column)
    by_name.update({column: column for column in columns})  # an exact name takes precedence over a similar one
    return {kind: tuple(dict.fromkeys(by_name[n] for n in names if n in by_name)) for kind, names in KINDS.items()}


@lru_cache(maxsize=1024)
def kinds_by_name(columns: tuple[str, ...]) -> dict[str, str]:
    """The kind of each column that has one."""
    return {name: kind for kind, names in names_by_kind(columns).items() for name in names}
