"""Rows with one response: a prompt and its completion, a conversation, a task and its output, plain text."""

from __future__ import annotations

from typing import Any

from fastdpo.data.forms.answers import answered, one_answer
from fastdpo.data.forms.columns import Cells
from fastdpo.data.forms.context import Context, read_context, system_text, with_system
from fastdpo.data.forms.messages import earlier_turns
from fastdpo.data.values import BadRow, as_text
from fastdpo.types import PreferenceRow


def prompt_completion(cells: Cells) -> PreferenceRow:
    """Text or messages, mixed as in `explicit_prompt`."""
    return _answer(read_context(cells), cells["completion"])


def messages_sft(cells: Cells) -> PreferenceRow:
    """One conversation; its last assistant message is the response, all before it the prompt."""
    return _last_answer(cells, "messages")


def conversations_sft(cells: Cells) -> PreferenceRow:
    """As `messages_sft`, with `from` and `value`."""
    return _last_answer(cells, "conversations" if "conversations" in cells else "conversation")


def has_conversations(cells: Cells) -> bool:
    return "conversations" in cells or "conversation" in cells


def _last_answer(cells: Cells, name: str) -> PreferenceRow:
    messages = earlier_turns(cells[name], "response") if cells.peek(name) is not None else []
    if not messages or messages[-1]["role"] != "assistant":
        raise BadRow("conversation does not end with the assistant")
    prompt = with_system(messages[:-1], system_text(cells))
    return PreferenceRow(prompt, (messages[-1:],), preferences=())


def alpaca(cells: Cells) -> PreferenceRow:
    """A task, optionally its input, and its output."""
    return _answer(read_context(cells), cells["output"])


def plain_text(cells: Cells) -> PreferenceRow:
    """Plain text: no prompt, the loss covers every token."""
    return PreferenceRow("", (as_text(cells["text"], "response"),), preferences=())


def _answer(context: Context, value: Any) -> PreferenceRow:
    answer = one_answer(value)
    if context.is_empty and isinstance(answer, str):
        raise BadRow("prompt is not text")
    prompt, responses = answered(context, [answer])
    return PreferenceRow(prompt, tuple(responses), preferences=())
