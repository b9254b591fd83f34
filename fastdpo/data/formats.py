"""From one example of a dataset (a dict of columns) to a `PreferenceRow`.

In: the columns of FORMATS, recognised by their names. Out: text or messages, with the prompt apart from the responses.
Refused with ValueError, because it concerns the whole dataset: columns that no format knows, images, video and audio.
Refused with BadRow, because it concerns one row, which the caller counts: a value that is not text, a missing answer.

Messages keep their further keys (name, tool_calls, ...); `template_kwargs` reads TRL's columns `tools` and
`chat_template_kwargs`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastdpo.data.values import (
    BadRow,
    as_messages,
    as_text,
    common_prefix_length,
    holds_messages,
    without_nones,
)
from fastdpo.types import Message, PreferenceRow

Example = Mapping[str, Any]

MEDIA = ("image", "images", "video", "videos", "audio", "audios")
HUMAN_TURN, ASSISTANT_TURN = "\n\nHuman:", "\n\nAssistant:"


@dataclass(frozen=True)
class RowFormat:
    """A known set of columns and the function that reads them."""

    name: str
    columns: tuple[str, ...]
    read: Callable[[Example], PreferenceRow]


def preference_row(example: Example) -> PreferenceRow:
    """The row with K = 2: response 0 is the chosen one, response 1 the rejected one.

    Raises:
        BadRow: this row cannot be used.
        ValueError: no format of FORMATS has these columns, or the example holds images, video or audio.
    """
    return _read(example, FORMATS)


def sft_row(example: Example) -> PreferenceRow:
    """The row with K = 1 and no preference: the response of an SFT format, or the chosen one of a preference format.

    Raises: as `preference_row`.
    """
    row = _read(example, FORMATS + SFT_FORMATS)
    chosen = row.preferences[0][0] if row.preferences else 0
    return PreferenceRow(row.prompt, (row.responses[chosen],), preferences=())


def template_kwargs(example: Example) -> dict[str, Any]:
    """What a row gives to the chat template: `tools` (a list, or JSON text of one) and `chat_template_kwargs`."""
    kwargs = without_nones(example.get("chat_template_kwargs") or {})
    if not isinstance(kwargs, dict):
        raise BadRow("chat_template_kwargs is not an object")
    tools = example.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError:
            raise BadRow("tools is not JSON") from None
    if tools:
        kwargs["tools"] = without_nones(tools)
    return kwargs


def _read(example: Example, formats: tuple[RowFormat, ...]) -> PreferenceRow:
    media = [name for name in MEDIA if _is_filled(example.get(name))]
    if media:
        raise ValueError(
            f"dataset must hold text only, got the columns {media}; vision and audio models are not supported"
        )
    for row_format in formats:
        if all(column in example for column in row_format.columns):
            return row_format.read(example)
    known = "; ".join(f"{f.name}: {', '.join(f.columns)}" for f in formats)
    raise ValueError(f"dataset must have the columns of a known format ({known}), got {sorted(example)}")


def _is_filled(value: Any) -> bool:
    return value is not None and not (isinstance(value, (list, tuple, str)) and len(value) == 0)


# --- one function per format ------------------------------------------------------------------------------------------


def explicit_prompt(example: Example) -> PreferenceRow:
    """Standard (text) or conversational (messages). Text beside messages becomes one message, the prompt of the user.

    Where the responses hold the whole conversation, their common start is the prompt; a text prompt beside them (as in
    UltraFeedback's releases) only repeats the question and is not used.
    """
    prompt, responses = example["prompt"], (example["chosen"], example["rejected"])
    if not any(holds_messages(value) for value in (prompt, *responses)):
        return PreferenceRow(as_text(prompt, "prompt"), tuple(as_text(r, "response") for r in responses))
    question = as_messages(prompt, "user", "prompt")
    answers = [as_messages(response, "assistant", "response") for response in responses]
    if all(answer[: len(question)] == question for answer in answers):
        return PreferenceRow(question, tuple(answer[len(question) :] for answer in answers))
    if isinstance(prompt, str) and all(answer and answer[0]["role"] in ("system", "user") for answer in answers):
        return _split_conversations(*answers)
    return PreferenceRow(question, tuple(answers))


def implicit_prompt(example: Example) -> PreferenceRow:
    """Both sides whole: HH transcripts, messages, or text. The prompt is their common start."""
    chosen, rejected = example["chosen"], example["rejected"]
    if holds_messages(chosen) or holds_messages(rejected):
        sides = [as_messages(side, "assistant", "response") for side in (chosen, rejected)]
        return _split_conversations(*sides)
    chosen, rejected = as_text(chosen, "response"), as_text(rejected, "response")
    start = _common_transcript(chosen, rejected) or _common_text(chosen, rejected)
    return PreferenceRow(start, (chosen[len(start) :], rejected[len(start) :]))


def llms_from_scratch(example: Example) -> PreferenceRow:
    """Raschka's "LLMs from scratch", and Alpaca-like pairs: a task, optionally its input. `output` is ignored."""
    return PreferenceRow(
        _task_prompt(example), tuple(as_text(example[side], "response") for side in ("chosen", "rejected"))
    )


def llama_factory(example: Example) -> PreferenceRow:
    """LLaMA-Factory's ShareGPT-like pairs: messages of `from` and `value`, one answer per side."""
    prompt = _conversation(example)
    return PreferenceRow(
        prompt, tuple(as_messages(example[side], "assistant", "response") for side in ("chosen", "rejected"))
    )


def llama_factory_v1(example: Example) -> PreferenceRow:
    """LLaMA-Factory's v1: two whole conversations, content in parts. The common start counts, not `loss_weight`."""
    return _split_conversations(
        *(as_messages(example[side], "assistant", "response") for side in ("chosen_messages", "rejected_messages"))
    )


def prompt_completion(example: Example) -> PreferenceRow:
    """Text or messages, mixed as in `explicit_prompt`."""
    prompt, completion = example["prompt"], example["completion"]
    if not (holds_messages(prompt) or holds_messages(completion)):
        return PreferenceRow(as_text(prompt, "prompt"), (as_text(completion, "response"),), preferences=())
    return PreferenceRow(
        as_messages(prompt, "user", "prompt"), (as_messages(completion, "assistant", "response"),), preferences=()
    )


def messages_sft(example: Example) -> PreferenceRow:
    """One conversation; its last assistant message is the response, all before it the prompt."""
    return _last_answer(as_messages(example["messages"], "user", "response"))


def conversations_sft(example: Example) -> PreferenceRow:
    """As `messages_sft`, with `from` and `value`."""
    return _last_answer(_conversation(example))


def alpaca_sft(example: Example) -> PreferenceRow:
    """A task, optionally its input, and its output."""
    return PreferenceRow(_task_prompt(example), (as_text(example["output"], "response"),), preferences=())


def text_sft(example: Example) -> PreferenceRow:
    """Plain text: no prompt, every token is learnt."""
    return PreferenceRow("", (as_text(example["text"], "response"),), preferences=())


FORMATS = (  # the first whose columns are all there wins
    RowFormat("LLaMA-Factory v1", ("chosen_messages", "rejected_messages"), llama_factory_v1),
    RowFormat("LLaMA-Factory", ("conversations", "chosen", "rejected"), llama_factory),
    RowFormat("explicit prompt", ("prompt", "chosen", "rejected"), explicit_prompt),
    RowFormat("LLMs-from-scratch", ("instruction", "chosen", "rejected"), llms_from_scratch),
    RowFormat("implicit prompt or HH transcript", ("chosen", "rejected"), implicit_prompt),
)
SFT_FORMATS = (
    RowFormat("prompt and completion", ("prompt", "completion"), prompt_completion),
    RowFormat("messages", ("messages",), messages_sft),
    RowFormat("ShareGPT", ("conversations",), conversations_sft),
    RowFormat("Alpaca", ("instruction", "output"), alpaca_sft),
    RowFormat("text", ("text",), text_sft),
)


# --- text -------------------------------------------------------------------------------------------------------------


def _task_prompt(example: Example) -> str:
    """Alpaca's headings, without its preamble: the same words before every task would only cost tokens."""
    task, task_input = as_text(example["instruction"], "prompt"), as_text(example.get("input") or "", "prompt")
    middle = f"### Input:\n{task_input}\n\n" if task_input else ""
    return f"### Instruction:\n{task}\n\n{middle}### Response:\n"


def _common_text(chosen: str, rejected: str) -> str:
    """The longest common start. A space at its end goes to the responses: most tokenizers join it to the next word.

    Where one side is the start of the other, its last word stays with the responses, or nothing would answer the
    prompt: "A: yes" and "A: yes, sir" share "A:".
    """
    start = chosen[: common_prefix_length(chosen, rejected)]
    if len(start) == min(len(chosen), len(rejected)):
        start = start.rstrip().rpartition(" ")[0]
    return start[:-1] if start.endswith(" ") else start


def _common_transcript(chosen: str, rejected: str) -> str:
    """HH transcripts: the prompt ends after the last "Assistant:" that both share. "" where there is none."""
    if not chosen.lstrip().startswith(HUMAN_TURN.lstrip()):
        return ""
    start = chosen[: common_prefix_length(chosen, rejected)]
    end = start.rfind(ASSISTANT_TURN)
    return start[: end + len(ASSISTANT_TURN)] if end >= 0 else ""


# --- messages ---------------------------------------------------------------------------------------------------------


def _conversation(example: Example) -> list[Message]:
    system = example.get("system")
    start = [{"role": "system", "content": as_text(system, "prompt")}] if system else []
    return start + as_messages(example["conversations"], "user", "prompt")


def _split_conversations(chosen: list[Message], rejected: list[Message]) -> PreferenceRow:
    """The common leading messages are the prompt; each side keeps at least one message."""
    shortest = min(len(chosen), len(rejected))
    if shortest == 0:
        raise BadRow("empty response")
    length = min(common_prefix_length(chosen, rejected), shortest - 1)
    return PreferenceRow(chosen[:length], (chosen[length:], rejected[length:]))


def _last_answer(messages: list[Message]) -> PreferenceRow:
    if not messages or messages[-1]["role"] != "assistant":
        raise BadRow("conversation does not end with the assistant")
    return PreferenceRow(messages[:-1], (messages[-1:],), preferences=())
