"""Builds the prompt from the columns before an answer: system prompt, earlier turns, context, question.

In: `Cells`. Out: `Context`, which gives the prompt as text or as messages. Content in two columns, such as a question
in `prompt` and at the end of `messages`, appears once.
Refused with BadRow: two system prompts, two questions.

If all parts are text, the prompt is text: the parts are separated by blank lines, and an Alpaca-like task gets its
headings. The prompt becomes messages if a column holds messages, if there are earlier turns or tools, which text cannot
express, or if the question is in a column `question` or `query`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastdpo.data.forms.columns import Cells
from fastdpo.data.forms.json_text import json_list
from fastdpo.data.forms.messages import as_messages, earlier_turns, same_message
from fastdpo.data.forms.text import task_text
from fastdpo.data.values import BadRow, as_text, common_prefix_length, holds_messages
from fastdpo.types import Message

Part = str | list[Message]
_TWO_SYSTEMS = "the row's system prompt differs from the conversation's own"


@dataclass
class Context:
    """The parts before the answers of a row, in order."""

    system: str = ""
    parts: list[Part] = field(default_factory=list)  # earlier turns, context
    question: Part | None = None
    is_asked: bool = False  # the question is somebody's, and becomes a message
    needs_messages: bool = False  # earlier turns in pairs, tools

    @property
    def is_empty(self) -> bool:
        return self.question is None and not self.parts and not self.system

    @property
    def holds_messages(self) -> bool:
        said = [*self.parts, self.question]
        return self.is_asked or self.needs_messages or any(isinstance(part, list) for part in said)

    def text(self) -> str:
        """The prompt as text, if all parts are text."""
        question = self.question if isinstance(self.question, str) else None
        texts = [str(part) for part in (self.system, *self.parts) if part and str(part).strip() not in (question or "")]
        return "\n\n".join(texts if question is None else [*texts, question])

    def messages(self) -> list[Message]:
        """The prompt as a conversation, the system prompt first."""
        messages: list[Message] = []
        passages = []  # context for the question
        for part in self.parts:
            if isinstance(part, str):
                passages.append(part)
            else:
                messages = joined(messages, part)
        question = self.question
        if isinstance(question, str) or (question is None and passages and not messages):
            texts = [*passages, question] if isinstance(question, str) else passages
            question = [{"role": "user", "content": "\n\n".join(texts)}]
        elif passages and question:
            question = _with_passages(question, passages)
        elif passages:
            messages = _with_passages(messages, passages)
        return with_system(joined(messages, question or []), self.system)


def read_context(cells: Cells, *, but: Sequence[str] = (), answers: Sequence[Part] = ()) -> Context:
    """The context of a row.

    Args:
        but: kinds of columns that are not context in this form.
        answers: the row's answers; a conversation that ends in one of them is used without it.
    """
    context = Context(system=system_text(cells), needs_messages=has_tools(cells))
    name = _question_column(cells, but)
    if name is not None and name == cells.column("instruction"):
        return _task(cells, context, name)
    if name is not None:
        value = _only_text(cells[name])
        context.question = as_messages(value, "user", "prompt") if holds_messages(value) else as_text(value, "prompt")
        context.is_asked = name != cells.column("prompt")
    for kind in ("history", "context"):
        for name in cells.all_filled(kind) if kind not in but else ():
            part = _part(cells[name], name)
            if kind == "context":
                part = _without_answer(part, answers, context.question)
            if not _is_repeated(part, context.question):
                context.parts.append(part)
    return context


class _Task(Context):
    """A task whose parts get Alpaca's headings if all parts are text."""

    def __init__(self, headings: str, **parts: Any) -> None:
        super().__init__(**parts)
        self._headings = headings

    @property
    def holds_messages(self) -> bool:
        return self.needs_messages

    def text(self) -> str:
        return self._headings


def _task(cells: Cells, context: Context, name: str) -> Context:
    """The context of an Alpaca-like row: `instruction`, its input, the turns before it."""
    more = cells.filled("question") or cells.filled("context")
    earlier_name = cells.filled("history")
    task, task_input = cells[name], "" if more is None else cells[more]
    earlier: Any = [] if earlier_name is None else cells[earlier_name]
    if isinstance(earlier, str) or holds_messages(task) or holds_messages(task_input):
        context.parts = [_part(part, str(earlier_name)) for part in (earlier, task_input) if part]
        context.question = as_messages(task, "user", "prompt") if holds_messages(task) else as_text(task, "prompt")
        return context
    turns = earlier_turns(earlier, "prompt")
    task, task_input = as_text(task, "prompt"), as_text(task_input, "prompt")
    return _Task(
        task_text(context.system, turns, task, task_input),
        system=context.system,
        parts=[turns] if turns else [],
        question="\n".join(filter(None, (task, task_input))),
        needs_messages=context.needs_messages,
    )


def system_text(cells: Cells) -> str:
    """The text of the system prompt column, "" if there is none."""
    name = cells.filled("system")
    if name is None:
        return ""
    value = cells[name]
    if isinstance(value, str):
        return as_text(value, "prompt")
    return "\n\n".join(message["content"] for message in as_messages(value, "system", "prompt"))


def has_tools(cells: Cells) -> bool:
    """Whether the row has tools, which only a chat template can render."""
    name = cells.filled("tools")
    return name is not None and bool(json_list(cells[name], "tools"))


def with_system(messages: list[Message], system: str) -> list[Message]:
    """The conversation with the given system prompt, which it may already begin with.

    Raises:
        BadRow: the conversation begins with another system prompt.
    """
    if not system.strip():
        return messages
    if messages and messages[0]["role"] == "system":
        if messages[0]["content"].strip() != system.strip():
            raise BadRow(_TWO_SYSTEMS)
        return messages
    return [{"role": "system", "content": system}, *messages]


def joined(before: list[Message], after: list[Message]) -> list[Message]:
    """Joins two conversations; the second one continues the first, or repeats the first or its end.

    Example: [system, question] and [question, answer] give [system, question, answer]; [question] and [system,
    question, answer] give the second.

    Raises:
        BadRow: the first ends in a question, and the second begins with another one.
    """
    if not before or not after:
        return before or after
    for overlap in range(min(len(before), len(after)), 0, -1):
        if _are_same(before[-overlap:], after[:overlap]):
            return [*before, *after[overlap:]]
    first = sum(message["role"] == "system" for message in after[:1])
    rest = [message for message in before if message["role"] != "system"]
    if not first and not rest:
        return [*before, *after]
    if _repeats(after, before):
        return after
    if first and before[0]["role"] == "system":
        raise BadRow(_TWO_SYSTEMS)
    goes_on = after[0]["role"] not in ("system", "user") or before[-1]["role"] not in ("system", "user")
    if first or not goes_on:
        raise BadRow("the conversation does not contain the row's prompt")
    return [*before, *after]


def starts_with(messages: Sequence[Message], start: Sequence[Message]) -> bool:
    return len(start) <= len(messages) and _are_same(messages[: len(start)], start)


def common_start(sides: Sequence[Sequence[Message]]) -> int:
    """Number of leading messages that all sides share."""
    return min(common_prefix_length(sides[0], side) for side in sides)


def _question_column(cells: Cells, but: Sequence[str]) -> str | None:
    """`prompt`, or else a question column; an empty text is a valid prompt."""
    name = None if "prompt" in but else cells.column("prompt")
    if name is not None and cells.peek(name) is not None and cells.peek(name) != []:
        return name
    kinds = [kind for kind in ("instruction", "question") if kind not in but]
    return next((found for kind in kinds if (found := cells.filled(kind)) is not None), None)


def _only_text(value: Any) -> Any:
    """The text inside a list of one text."""
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        if len(value) > 1:
            raise BadRow("prompt is a list of several texts")
        return value[0]
    return value


def _part(value: Any, name: str) -> Part:
    if isinstance(value, str):
        return as_text(value, "prompt")
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        if name.lower() != "context":
            return earlier_turns(value, "prompt")
        return "\n\n".join(as_text(item, "prompt") for item in value)  # passages
    return earlier_turns(value, "prompt") if holds_messages(value) else as_text(value, "prompt")


def _without_answer(part: Part, answers: Sequence[Part], question: Part | None) -> Part:
    """A conversation without its last message, if that is one of `answers`, such as the chosen answer in `messages`; if
    the row has a question, only an answer to this question is removed."""
    if isinstance(part, str) or not part or part[-1]["role"] != "assistant":
        return part
    last = [as_messages(answer, "assistant", "response")[-1:] for answer in answers if answer]
    asked = as_messages(question, "user", "prompt")[-1:] if question else part[-2:-1]
    answers_it = _are_same(part[-2:-1], asked) and any(_are_same(part[-1:], answer) for answer in last)
    return part[:-1] if answers_it else part


def _is_repeated(part: Part, question: Part | None) -> bool:
    """Whether the part only repeats a question that is text."""
    is_question = isinstance(part, list) and len(part) == 1 and part[0]["role"] == "user"
    return is_question and isinstance(question, str) and part[0]["content"].strip() == question.strip()  # type: ignore[index]


def _with_passages(question: list[Message], passages: list[str]) -> list[Message]:
    """Inserts the passages before the first user message."""
    at = next((i for i, message in enumerate(question) if message["role"] == "user"), None)
    if at is None:
        raise BadRow("context beside a prompt without a user message")
    asked = question[at]
    content = "\n\n".join([*(p for p in passages if p.strip() not in asked["content"]), asked["content"]])
    return [*question[:at], {**asked, "content": content}, *question[at + 1 :]]


def _are_same(messages: Sequence[Message], others: Sequence[Message]) -> bool:
    return all(map(same_message, messages, others))


def _repeats(conversation: Sequence[Message], part: Sequence[Message]) -> bool:
    """Whether the conversation contains every message of `part`, with the same roles."""
    return all(
        any(
            message["role"] == other["role"]
            and message["content"].strip() in other["content"]
            and message.get("tool_calls") in (None, other.get("tool_calls"))
            for other in conversation
        )
        for message in part
    )
