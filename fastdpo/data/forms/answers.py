"""From a context and its answers to a row with one or several answers on either side of a preference.

In: cells of answers: text, a message, a conversation, or a list of these, where each element is a separate answer.
Out: a `PreferenceRow`; every better answer is preferred to every worse one. If whole conversations repeat the prompt,
the row holds it once. Refused with BadRow: an answer without an assistant message, a value that is neither text nor
messages, a context that contradicts the conversations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastdpo.data.forms.context import Context, common_start, joined, starts_with, with_system
from fastdpo.data.forms.json_text import messages_in
from fastdpo.data.forms.messages import as_messages, is_empty
from fastdpo.data.forms.text import common_text_start
from fastdpo.data.values import BadRow, as_text
from fastdpo.types import Message, PreferenceRow

Answer = str | list[Message]


def answers_in(value: Any) -> list[Answer]:
    """The answers of one cell: each element of a list of texts or conversations, or the cell as one answer.

    Raises:
        BadRow: the cell holds no answer.
    """
    value = messages_in(value, "response")
    if isinstance(value, str):
        return [as_text(value, "response")]
    if isinstance(value, Mapping):
        return [as_messages(value, "assistant", "response")]
    if not isinstance(value, list):
        raise BadRow("response is not text")
    if not value:
        raise BadRow("empty response")
    if all(isinstance(item, Mapping) for item in value):
        return [as_messages(value, "assistant", "response")]
    if all(isinstance(item, (str, list)) or item is None for item in value):
        return [answer for item in value if item is not None for answer in answers_in(item)]
    raise BadRow("response is not text")


def one_answer(value: Any) -> Answer:
    """The single answer of a cell."""
    answers = answers_in(value)
    if len(answers) != 1:
        raise BadRow("a list of answers where one answer is expected")
    return answers[0]


def preferred(context: Context, chosen: Sequence[Answer], rejected: Sequence[Answer]) -> PreferenceRow:
    """The row in which every answer of `chosen` is preferred to every one of `rejected`."""
    if len(chosen) != 1 or len(rejected) != 1:
        chosen, rejected = _told_apart(chosen, rejected)
    pairs = tuple((better, len(chosen) + worse) for better in range(len(chosen)) for worse in range(len(rejected)))
    prompt, responses = answered(context, [*chosen, *rejected])
    return PreferenceRow(prompt, tuple(responses), pairs)


def answered(context: Context, answers: Sequence[Answer]) -> tuple[str | list[Message], Sequence[Answer]]:
    """The prompt, and each answer without it."""
    if context.holds_messages or any(isinstance(answer, list) for answer in answers):
        conversations = [as_messages(a, "assistant", "response") if isinstance(a, str) else a for a in answers]
        return _conversations(context.messages(), conversations)
    if not context.is_empty and (context.question is not None or context.parts):
        return context.text(), answers
    texts = [str(answer) for answer in answers]
    start = common_text_start(texts)
    system = f"{context.system}\n\n" if context.system else ""
    return system + start, [text[len(start) :] for text in texts]


def _conversations(
    before: list[Message], answers: Sequence[list[Message]]
) -> tuple[list[Message], Sequence[list[Message]]]:
    if any(len(answer) == 0 for answer in answers):
        raise BadRow("empty response")
    _check_speakers(answers)
    whole = [answer for answer in answers if _is_whole(answer)]
    if whole and len(whole) < len(answers):  # the other answers share the whole conversations' prompt
        length = min(common_start(whole), *(len(answer) - 1 for answer in whole))
        before = _joined(before, whole[0][:length])
    sides = [_joined(before, answer) if _is_whole(answer) else [*before, *answer] for answer in answers]
    length = _prompt_length(before, sides)
    responses = [side[length:] for side in sides]
    _check_speakers(responses)
    return sides[0][:length], responses


def _prompt_length(before: Sequence[Message], sides: Sequence[Sequence[Message]]) -> int:
    """Number of messages before the answers: those of the context and any further messages up to the assistant's, or,
    if there are only whole conversations, their common start. Each side keeps at least one message."""
    shared = min(common_start(sides), min(map(len, sides)) - 1)
    if all(message["role"] == "system" for message in before) or not all(starts_with(side, before) for side in sides):
        return shared
    length = len(before)
    while length < shared and sides[0][length]["role"] != "assistant":
        length += 1
    return min(length, min(map(len, sides)) - 1)


def _check_speakers(responses: Sequence[Sequence[Message]]) -> None:
    if any(all(message["role"] != "assistant" for message in response) for response in responses):
        raise BadRow("response without an assistant message")


def _joined(before: list[Message], answer: list[Message]) -> list[Message]:
    if before and before[0]["role"] == "system" and answer[0]["role"] != "system":
        return with_system(joined(before[1:], answer), before[0]["content"])
    return joined(before, answer)


def _is_whole(answer: Sequence[Message]) -> bool:
    """Whether a conversation includes the messages before the answer."""
    return answer[0]["role"] in ("system", "user")


def _told_apart(chosen: Sequence[Answer], rejected: Sequence[Answer]) -> tuple[list[Answer], list[Answer]]:
    """Both sides without empty and repeated answers; an answer on both sides is dropped from the rejected one."""
    better, worse = (_unique([a for a in answers if not is_empty(a)]) for answers in (chosen, rejected))
    if not better or not worse:
        raise BadRow("empty response")
    kept = [answer for answer in worse if answer not in better]
    if not kept:
        raise BadRow("chosen equals rejected")
    return better, kept


def _unique(answers: Sequence[Answer]) -> list[Answer]:
    return [answer for position, answer in enumerate(answers) if answer not in answers[:position]]
