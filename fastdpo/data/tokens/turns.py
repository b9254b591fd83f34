"""Masks the assistant's tokens in responses of several turns: the turns of users and tools in between must not count in
a log-prob.

In: the messages, their tokens, and the rendering function of the chat template. Out: a mask of tokens. If the template
marks the assistant's parts (`{% generation %}`), these count. Otherwise a turn begins at the end of the preceding
conversation rendered with the generation prompt, and ends at the end of the conversation up to this turn; both
positions are checked. HH transcripts show their turns in the text.
Refused with BadRow: a template that allows neither way.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from fastdpo.data.forms import ASSISTANT_TURN, HUMAN_TURN
from fastdpo.data.values import BadRow, common_prefix_length
from fastdpo.types import Message, PreferenceRow

_USER_AGAIN = re.compile(rf"({HUMAN_TURN}(?:.*?{ASSISTANT_TURN}|.*\Z))", re.DOTALL)
_UNCLEAR = "the chat template does not show which tokens of several turns are the assistant's"
_TAIL = 16  # last characters of a turn that must be found in its tokens

Render = Callable[..., list[int]]  # (messages, add_generation_prompt=False) -> token ids


def assistant_mask(
    messages: Sequence[Message], num_prompt: int, ids: Sequence[int], render: Render, decode: Callable[..., str]
) -> list[bool]:
    """(L,) True for the assistant's tokens from message `num_prompt` on, including the end of each turn.

    Args:
        messages: the whole conversation; the first `num_prompt` (at least one) are the prompt.
        ids: (L,) its tokens; tokens after the last message belong to it.
    Raises:
        BadRow: there is no assistant message, or the template renders a turn differently inside the conversation.
    """
    turns = [i for i in range(num_prompt, len(messages)) if messages[i]["role"] == "assistant"]
    if not turns:
        raise BadRow("response without an assistant message")
    mask = [False] * len(ids)
    for turn in turns:
        start = _start(messages[:turn], ids, render)
        end = len(ids)
        if turn < len(messages) - 1:
            end = start + _num_tokens(render(messages[: turn + 1])[start:], ids[start:], messages[turn], decode)
        mask[start:end] = [True] * (end - start)
    return mask


def has_several_turns(row: PreferenceRow) -> bool:
    """Whether a response has several messages, or is a transcript with another user turn."""
    if row.is_conversational:
        return any(len(response) > 1 for response in row.responses)
    prompt = str(row.prompt)
    is_transcript = prompt.lstrip().startswith(HUMAN_TURN.lstrip()) and prompt.endswith(ASSISTANT_TURN)
    return is_transcript and any(HUMAN_TURN in response for response in row.responses)


def transcript_mask(prompt: str, response: str, ids: Sequence[int], encode: Callable[[str], list[int]]) -> list[bool]:
    """(L,) True for the assistant's tokens in a response of "...\n\nHuman: ... \n\nAssistant: ..." text.

    Args:
        ids: (L,) tokens of prompt and response; tokens after the assistant's last turn belong to it.
        encode: returns the tokens of a text, without an EOS.
    """
    mask = [False] * len(ids)
    pieces = _USER_AGAIN.split(response)  # assistant and user turns, alternating
    text = prompt
    for number, piece in enumerate(pieces):
        if number % 2 == 0 and piece:
            start = common_prefix_length(encode(text), ids)
            end = len(ids) if number == len(pieces) - 1 else common_prefix_length(encode(text + piece), ids)
            mask[start:end] = [True] * (end - start)
        text += piece
    return mask


def _start(before: Sequence[Message], ids: Sequence[int], render: Render) -> int:
    """Start of the turn after `before`. The generation prompt's end may differ, as by an empty thought."""
    start = common_prefix_length(render(before, add_generation_prompt=True), ids)
    if start < len(render(before)) - 1:  # one token may merge with the following text
        raise BadRow(_UNCLEAR)
    return start


def _num_tokens(alone: Sequence[int], rest: Sequence[int], message: Message, decode: Callable[..., str]) -> int:
    """Number of tokens at the start of `rest`, the tokens from a turn's start on, that belong to the turn.

    Args:
        alone: the same turn rendered at the end of a conversation. Its last token may merge with the following text,
            and its first tokens may be missing inside a conversation: templates like Qwen 3's put an empty thought
            block only into the last turn.
    """
    shared = common_prefix_length(alone, rest)
    if shared > 0 and len(alone) - shared <= 1:
        return shared
    content = str(message["content"]).strip()[-_TAIL:]
    for skipped in range(1, len(alone)):
        kept = list(alone[skipped:])
        if list(rest[: len(kept)]) != kept:
            continue
        if (content in decode(kept)) if content else (2 * skipped <= len(alone)):
            return len(kept)
        break
    raise BadRow(_UNCLEAR)
