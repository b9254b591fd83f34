"""Rows as text: the common start of transcripts and texts, and how turns are written without a chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastdpo.data.values import BadRow, common_prefix_length
from fastdpo.types import Message, PreferenceRow

HUMAN_TURN, ASSISTANT_TURN = "\n\nHuman:", "\n\nAssistant:"


def task_text(system: str, earlier: Sequence[Message], task: str, task_input: str) -> str:
    """A task with Alpaca's headings, without its preamble: the same words before every task would only cost tokens. A
    system prompt comes first, without a heading; earlier turns get the headings of a task and its response.

    Raises:
        BadRow: an earlier turn has a role other than user, assistant and system, which has no heading.
    """
    headings = {"user": "### Instruction:\n{}\n\n", "assistant": "### Response:\n{}\n\n", "system": "{}\n\n"}
    before = f"{system}\n\n" if system else ""
    for message in earlier:
        if message["role"] not in headings:
            raise BadRow(f"earlier turns of the role {message['role']!r} beside an instruction")
        before += headings[message["role"]].format(message["content"])
    middle = f"### Input:\n{task_input}\n\n" if task_input else ""
    return f"{before}### Instruction:\n{task}\n\n{middle}### Response:\n"


def as_transcript(row: PreferenceRow) -> PreferenceRow:
    """Messages as an HH transcript, for tokenizers without a chat template; the original DPO release writes HH, SHP and
    Stack Exchange like this. A system message comes first, without a name."""
    names = {"user": f"{HUMAN_TURN} ", "assistant": f"{ASSISTANT_TURN} "}

    def text(messages: Any) -> str:
        return "".join(names.get(message["role"], "") + message["content"] for message in messages)

    start = f"{text(row.prompt)}{ASSISTANT_TURN}"
    responses = tuple(text(response).removeprefix(ASSISTANT_TURN) for response in row.responses)
    return PreferenceRow(start, responses, row.preferences)


def common_text_start(texts: Sequence[str]) -> str:
    """The common prompt of whole texts: of transcripts, up to an answer; of other texts, their longest common start."""
    first, *others = texts
    starts = [_common_transcript(first, other) or _common_text(first, other) for other in others]
    return min(starts, key=len, default="")


def _common_text(chosen: str, rejected: str) -> str:
    """The longest common start. A space at its end goes to the responses: most tokenizers join it to the next word.

    If one side is a prefix of the other, its last word stays with the responses, so that no response is empty: "A: yes"
    and "A: yes, sir" share "A:".
    """
    start = chosen[: common_prefix_length(chosen, rejected)]
    if len(start) == min(len(chosen), len(rejected)):
        start = start.rstrip()
        start = start[: len(start) - len(start.split()[-1])] if start else ""
    return start[:-1] if start.endswith(" ") else start


def _common_transcript(chosen: str, rejected: str) -> str:
    """HH transcripts: the prompt ends after the last "Assistant:" that both share. "" if they share none."""
    if not chosen.lstrip().startswith(HUMAN_TURN.lstrip()):
        return ""
    start = chosen[: common_prefix_length(chosen, rejected)]
    end = start.rfind(ASSISTANT_TURN)
    return start[: end + len(ASSISTANT_TURN)] if end >= 0 else ""
