"""Rows with a chosen and a rejected answer, under any known names; the prompt is a column or the start of both.

In: `Cells`. Out: a `PreferenceRow`. The context is read by `context`, the answers by `answers`.
"""

from __future__ import annotations

from typing import Any

from fastdpo.data.forms.answers import answers_in, preferred
from fastdpo.data.forms.columns import Cells
from fastdpo.data.forms.context import Context, has_tools, read_context, system_text
from fastdpo.data.forms.messages import earlier_turns
from fastdpo.data.forms.names import PROMPT_KINDS
from fastdpo.data.values import BadRow, holds_messages
from fastdpo.types import PreferenceRow


def explicit_prompt(cells: Cells) -> PreferenceRow:
    """Standard (text) or conversational (messages) rows. Text beside messages becomes one message.

    If the responses hold the whole conversation, their common start is the prompt; a separate prompt, such as the text
    in UltraFeedback's releases, only repeats it.
    """
    chosen, rejected = (answers_in(_side(cells, kind)) for kind in ("chosen", "rejected"))
    context = read_context(cells, answers=[*chosen, *rejected])
    if context.question is None and not context.parts and not any(isinstance(a, list) for a in (*chosen, *rejected)):
        raise BadRow("prompt is not text")
    return preferred(context, chosen, rejected)


def implicit_prompt(cells: Cells) -> PreferenceRow:
    """Both sides hold the whole conversation: HH transcripts, messages, or text. The prompt is their common start."""
    chosen, rejected = (answers_in(_side(cells, kind)) for kind in ("chosen", "rejected"))
    return preferred(Context(system=system_text(cells), needs_messages=has_tools(cells)), chosen, rejected)


def response_and_rejected(cells: Cells) -> PreferenceRow:
    """A column `response`, as in fine-tuning data, beside the rejected response."""
    chosen, rejected = answers_in(_side(cells, "response")), answers_in(_side(cells, "rejected"))
    return preferred(read_context(cells, answers=[*chosen, *rejected]), chosen, rejected)


def conversation_and_rejected(cells: Cells) -> PreferenceRow:
    """ms-swift's and OpenPipe's form: a conversation that ends in the chosen answer, and the rejected answer as text,
    as messages, or as a whole conversation."""
    name = next((n for n in cells.all_filled("context") if holds_messages(cells.peek(n))), None)
    whole = [] if name is None else earlier_turns(cells[name], "response")
    if not whole or whole[-1]["role"] != "assistant":
        raise BadRow("conversation does not end with the assistant")
    context = read_context(cells, but=("context",))
    return preferred(context, [whole], answers_in(_side(cells, "rejected")))


def has_pair(cells: Cells) -> bool:
    return cells.has("chosen", "rejected")


def has_context(cells: Cells) -> bool:
    """Whether the row has a context column beside the answers."""
    return any(cells.has(kind) for kind in PROMPT_KINDS if kind != "system")


def has_response_and_rejected(cells: Cells) -> bool:
    return has_context(cells) and cells.has("response", "rejected") and not cells.has("chosen")


def has_conversation_and_rejected(cells: Cells) -> bool:
    return cells.has("context", "rejected") and not cells.has("chosen")


def _side(cells: Cells, kind: str) -> Any:
    name = cells.column(kind)
    if name is None:
        raise BadRow(f"no {kind} response")
    return cells[name]
