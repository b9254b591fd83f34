"""From one example of a dataset (a dict of columns) to a `PreferenceRow`.

In: the columns of FORMATS, recognised by their names. Out: text or messages, with the prompt apart from the responses.
Refused with ValueError, because it concerns the whole dataset: columns that no format knows, images, video and audio.
Refused with BadRow, because it concerns one row, which the caller counts: a value that is not text, a missing answer.

Messages keep their further keys (name, tool_calls, ...); `template_kwargs` reads TRL's columns `tools` and
`chat_template_kwargs`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastdpo.types import Message, PreferenceRow

Example = Mapping[str, Any]

MEDIA = ("image", "images", "video", "videos", "audio", "audios")
ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}  # ShareGPT's names
HUMAN_TURN, ASSISTANT_TURN = "\n\nHuman:", "\n\nAssistant:"


class BadRow(ValueError):
    """One row that cannot be used. `reason` is the same for all rows with that fault, so that it can be counted."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


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
    kwargs = dict(_without_nones(example.get("chat_template_kwargs") or {}))
    tools = example.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError:
            raise BadRow("tools is not JSON") from None
    if tools:
        kwargs["tools"] = _without_nones(tools)
    return kwargs


def common_prefix_length(items: Sequence[Any], other: Sequence[Any]) -> int:
    """Number of leading characters, messages or tokens that both share."""
    for position, (a, b) in enumerate(zip(items, other, strict=False)):
        if a != b:
            return position
    return min(len(items), len(other))


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
    if not any(_holds_messages(value) for value in (prompt, *responses)):
        return PreferenceRow(_text(prompt, "prompt"), tuple(_text(r, "response") for r in responses))
    question = _messages(prompt, "user", "prompt")
    answers = [_messages(response, "assistant", "response") for response in responses]
    if all(answer[: len(question)] == question for answer in answers):
        return PreferenceRow(question, tuple(answer[len(question) :] for answer in answers))
    if isinstance(prompt, str) and all(answer and answer[0]["role"] in ("system", "user") for answer in answers):
        return _split_conversations(*answers)
    return PreferenceRow(question, tuple(answers))


def implicit_prompt(example: Example) -> PreferenceRow:
    """Both sides whole: HH transcripts, messages, or text. The prompt is their common start."""
    chosen, rejected = example["chosen"], example["rejected"]
    if _holds_messages(chosen) or _holds_messages(rejected):
        sides = [_messages(side, "assistant", "response") for side in (chosen, rejected)]
        return _split_conversations(*sides)
    chosen, rejected = _text(chosen, "response"), _text(rejected, "response")
    start = _common_transcript(chosen, rejected) or _common_text(chosen, rejected)
    return PreferenceRow(start, (chosen[len(start) :], rejected[len(start) :]))


def llms_from_scratch(example: Example) -> PreferenceRow:
    """Raschka's "LLMs from scratch", and Alpaca-like pairs: a task, optionally its input. `output` is ignored."""
    return PreferenceRow(
        _task_prompt(example), tuple(_text(example[side], "response") for side in ("chosen", "rejected"))
    )


def llama_factory(example: Example) -> PreferenceRow:
    """LLaMA-Factory's ShareGPT-like pairs: messages of `from` and `value`, one answer per side."""
    prompt = _conversation(example)
    return PreferenceRow(
        prompt, tuple(_messages(example[side], "assistant", "response") for side in ("chosen", "rejected"))
    )


def llama_factory_v1(example: Example) -> PreferenceRow:
    """LLaMA-Factory's v1: two whole conversations, content in parts. The common start counts, not `loss_weight`."""
    return _split_conversations(
        *(_messages(example[side], "assistant", "response") for side in ("chosen_messages", "rejected_messages"))
    )


def prompt_completion(example: Example) -> PreferenceRow:
    """Text or messages, mixed as in `explicit_prompt`."""
    prompt, completion = example["prompt"], example["completion"]
    if not (_holds_messages(prompt) or _holds_messages(completion)):
        return PreferenceRow(_text(prompt, "prompt"), (_text(completion, "response"),), preferences=())
    return PreferenceRow(
        _messages(prompt, "user", "prompt"), (_messages(completion, "assistant", "response"),), preferences=()
    )


def messages_sft(example: Example) -> PreferenceRow:
    """One conversation; its last assistant message is the response, all before it the prompt."""
    return _last_answer(_messages(example["messages"], "user", "response"))


def conversations_sft(example: Example) -> PreferenceRow:
    """As `messages_sft`, with `from` and `value`."""
    return _last_answer(_conversation(example))


def alpaca_sft(example: Example) -> PreferenceRow:
    """A task, optionally its input, and its output."""
    return PreferenceRow(_task_prompt(example), (_text(example["output"], "response"),), preferences=())


def text_sft(example: Example) -> PreferenceRow:
    """Plain text: no prompt, every token is learnt."""
    return PreferenceRow("", (_text(example["text"], "response"),), preferences=())


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


def _text(value: Any, field: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{field} is not text")
    return value


def _task_prompt(example: Example) -> str:
    """Alpaca's headings, without its preamble: the same words before every task would only cost tokens."""
    task, task_input = _text(example["instruction"], "prompt"), _text(example.get("input") or "", "prompt")
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


def _holds_messages(value: Any) -> bool:
    return isinstance(value, (list, Mapping))


def _messages(value: Any, role: str, field: str) -> list[Message]:
    """Messages from a list of them, from one message, or from text, which `role` then says."""
    values = value if isinstance(value, list) else [value]
    return [_message(item, role, field) for item in values]


def _message(value: Any, role: str, field: str) -> Message:
    """{"role", "content" as text, and further keys that are not None}, from role/content or ShareGPT's from/value."""
    if not isinstance(value, Mapping):
        return {"role": role, "content": _text(value, field)}
    speaker = value.get("role") or value.get("from")
    if not isinstance(speaker, str):
        raise BadRow("message without role")
    rest = {k: v for k, v in value.items() if k not in ("role", "content", "from", "value", "loss_weight")}
    content = value.get("value") if value.get("content") is None else value["content"]
    if content is None and rest.get("tool_calls"):
        content = ""
    return {"role": ROLES.get(speaker, speaker), "content": _content(content, field), **_without_nones(rest)}


def _content(value: Any, field: str) -> str:
    """Text, or the joined text of parts {"type": "text", "text" or "value": "..."}."""
    if not isinstance(value, list):
        return _text(value, field)
    kinds = {part.get("type") if isinstance(part, Mapping) else None for part in value}
    if any(isinstance(kind, str) and kind.startswith(("image", "video", "audio", "input_audio")) for kind in kinds):
        raise ValueError(
            f"message content must be text, got parts of type {sorted(map(str, kinds))}; "
            "vision and audio models are not supported"
        )
    if kinds - {"text"}:
        raise BadRow(f"{field} is not text")
    return "".join(
        _text(part.get("text") if part.get("text") is not None else part.get("value"), field) for part in value
    )


def _without_nones(value: Any) -> Any:
    """Arrow fills the keys that a row lacks with None; templates would take them as given."""
    if isinstance(value, Mapping):
        return {k: _without_nones(v) for k, v in value.items() if v is not None}
    return [_without_nones(item) for item in value] if isinstance(value, list) else value


def _conversation(example: Example) -> list[Message]:
    system = example.get("system")
    start = [{"role": "system", "content": _text(system, "prompt")}] if system else []
    return start + _messages(example["conversations"], "user", "prompt")


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
