"""From a row of messages to the conversations to render.

In: a row of messages. Out: its prompt, and the whole conversation of each response. If the prompt ends in an assistant
turn, the first message of every response continues this turn, and no new turn is opened.
Refused with BadRow: no prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fastdpo.data.tokens.chat.rendering import Span
from fastdpo.data.tokens.chat.strings import THOUGHT_KEYS
from fastdpo.data.tokens.control import ends_in_markup
from fastdpo.data.tokens.encoding import Ids
from fastdpo.data.tokens.notes import Note
from fastdpo.data.tokens.turns import has_several_turns
from fastdpo.data.values import BadRow
from fastdpo.types import Message, PreferenceRow


@dataclass
class Chat:
    """A row of messages on its way to tokens."""

    prompt: list[Message]
    wholes: list[list[Message]]  # the conversation of each response
    num_prompt: int  # messages of each that are the prompt's
    goes_on: bool  # the prompt ends inside the assistant's turn, which is message `num_prompt`
    kwargs: dict[str, Any]  # of the chat template
    sides: tuple[str, ...]  # names of the responses in notes
    has_turns: bool = False  # a response has several messages
    is_marked: bool = False  # messages spell out special tokens, and `texts` have marks around them
    texts: list[str] = field(default_factory=list)  # prompt and wholes as the template writes them
    ids: list[Ids] = field(default_factory=list)  # the same as tokens, where a tokenizer renders by code
    spans: list[tuple[Span, ...]] = field(default_factory=list)  # of the wholes, where the template marks them
    notes: list[Note] = field(default_factory=list)


def as_chat(row: PreferenceRow, kwargs: dict[str, Any], sides: tuple[str, ...], eos: str | None) -> Chat:
    """Prompt and whole conversations; an assistant turn at the end of the prompt is continued.

    Raises:
        BadRow: the prompt has no message.
    """
    prompt: list[Message] = list(row.prompt)  # type: ignore[arg-type]
    if not prompt:
        raise BadRow("empty prompt")
    responses = [_without_final_eos(response, eos) for response in row.responses]
    has_turns = has_several_turns(row)
    is_begun = prompt[-1]["role"] == "assistant" and not prompt[-1].get("tool_calls")
    is_begun = is_begun and all(response[0]["role"] == "assistant" for response in responses)
    if is_begun and not any(prompt[-1].get(key) for key in ("content", *THOUGHT_KEYS)):
        prompt, is_begun = prompt[:-1], False  # an empty turn is the one that the generation prompt opens
        if not prompt:
            raise BadRow("empty prompt")
    if not is_begun:
        wholes = [prompt + response for response in responses]
        return Chat(prompt, wholes, len(prompt), False, kwargs, sides, has_turns)
    prompt[-1] = {**prompt[-1], "content": prompt[-1].get("content") or ""}
    wholes = [[*prompt[:-1], _joined(prompt[-1], first), *rest] for first, *rest in responses]
    return Chat(prompt, wholes, len(prompt) - 1, True, kwargs, sides, has_turns)


def _joined(begun: Message, rest: Message) -> Message:
    """Joins the beginning and the rest of an assistant turn."""
    joined = {**begun, **rest}
    for key in ("content", *THOUGHT_KEYS):
        if isinstance(begun.get(key), str) and isinstance(rest.get(key), str):
            joined[key] = begun[key] + rest[key]
    return joined


def _without_final_eos(messages: Any, eos: str | None) -> list[Message]:
    """The messages without an EOS that the last one spells out: the template, or the code that closes the turn, adds
    it. An EOS that closes an `<s>` of the text is text."""
    last = messages[-1]
    content = last.get("content")
    if not eos or not isinstance(content, str) or not content.endswith(eos) or ends_in_markup(content, eos):
        return list(messages)
    return [*messages[:-1], {**last, "content": content.removesuffix(eos)}]
