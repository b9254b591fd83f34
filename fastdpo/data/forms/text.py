"""Rows as text: where transcripts and texts part, and how turns are written where there is no chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastdpo.data.values import BadRow, common_prefix_length
from fastdpo.types import Message, PreferenceRow

HUMAN_TURN, ASSISTANT_TURN = "\n\nHuman:", "\n\nAssistant:"


def task_text(system: str, earlier: Sequence[Message], task: str, task_input: str) -> str:
    """Alpaca's headings, without its preamble: the same words before every task would only cost tokens. A system prompt
    stands in front without a name; earlier turns have the headings of a task and its response.

    Raises:
        BadRow: earlier turns of somebody else than user and assistant, for whom there is no heading.
    """
    headings = {"user": "### Instruction:\n{}\n\n", "assistant": "### Response:\n{}\n\n", "system": "{}\n\n"}
    before = f"{system}\n\n" if system else ""
    for message in earlier:
        if message["role"] not in headings:
            raise BadRow(f"earlier turns of {message['role']!r} beside an instruction")
        before += headings[message["role"]].format(message["content"])
    middle = f"### Input:\n{task_input}\n\n" if task_input else ""
    return f"{before}### Instruction:\n{task}\n\n{middle}### Response:\n"


def as_transcript(row: PreferenceRow) -> PreferenceRow:
    """Messages as text in the manner of HH, for tokenizers without a chat template: what the original release of DPO
    did with HH, SHP and Stack Exchange. A system message stands in front without a name."""
    names = {"user": f"{HUMAN_TURN} ", "assistant": f"{ASSISTANT_TURN} "}

    def text(messages: Any) -> str:
        return "".join(names.get(message["role"], "") + message["content"] for message in messages)

    start = f"{text(row.prompt)}{ASSISTANT_TURN}"
    responses = tuple(text(response).removeprefix(ASSISTANT_TURN) for response in row.responses)
    return PreferenceRow(start, responses, row.preferences)


def common_text_start(texts: Sequence[str]) -> str:
    """What texts that hold their prompt begin with in common: a transcript up to an answer, or the longest start."""
    first, *others = texts
    starts = [_common_transcript(first, other) or _common_text(first, other) for other in others]
    return min(starts, key=len, default="")


def _common_text(chosen: str, rejected: str) -> str:
    """The longest common start. A space at its end goes to the responses: most tokenizers join it to the next word.

    Where one side is the start of the other, its last word stays with the responses, or nothing would answer the
    prompt: "A: yes" and "A: yes, sir" share "A:".
    """
    start = chosen[: common_prefix_length(chosen, rejected)]
    if len(start) == min(len(chosen), len(rejected)):
        start = start.rstrip()
        start = start[: len(start) - len(start.split()[-1])] if start else ""
    return start[:-1] if start.endswith(" ") else start


def _common_transcript(chosen: str, rejected: str) -> str:
    """HH transcripts: the prompt ends after the last "Assistant:" that both share. "" where there is none."""
    if not chosen.lstrip().startswith(HUMAN_TURN.lstrip()):
        return ""
    start = chosen[: common_prefix_length(chosen, rejected)]
    end = start.rfind(ASSISTANT_TURN)
    return start[: end + len(ASSISTANT_TURN)] if end >= 0 else ""
