"""The general forms of preference and fine-tuning rows: TRL's, and those that any dataset may have.

In: the columns that FORMS and SFT_FORMS list. Out: a `PreferenceRow`. Refused with BadRow: a value that is not text or
messages, a missing answer. Datasets with columns of their own are in `fastdpo.data.adapters`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from fastdpo.data.values import (
    BadRow,
    Example,
    RowFormat,
    as_messages,
    as_text,
    common_prefix_length,
    holds_messages,
)
from fastdpo.types import Message, PreferenceRow

HUMAN_TURN, ASSISTANT_TURN = "\n\nHuman:", "\n\nAssistant:"

# --- preferences ------------------------------------------------------------------------------------------------------


def explicit_prompt(example: Example) -> PreferenceRow:
    """Standard (text) or conversational (messages). Text beside messages becomes one message, the prompt of the user.

    Where the responses hold the whole conversation, their common start is the prompt; a text prompt beside them (as in
    UltraFeedback's releases) only repeats the question and is not used.
    """
    prompt, responses = example["prompt"], (example["chosen"], example["rejected"])
    if not any(holds_messages(value) for value in (prompt, *responses)):
        return PreferenceRow(as_text(prompt, "prompt"), tuple(as_text(r, "response") for r in responses))
    question = as_messages(prompt, "user", "prompt")
    return answered(question, *responses, may_repeat=isinstance(prompt, str))


def answered(question: list[Message], chosen: Any, rejected: Any, *, may_repeat: bool) -> PreferenceRow:
    """A question in messages and two answers, in text, messages or whole conversations that begin with the question.

    Args:
        may_repeat: conversations that begin otherwise, as with a system message, hold the question too.
    """
    answers = [as_messages(answer, "assistant", "response") for answer in (chosen, rejected)]
    if all(answer[: len(question)] == question for answer in answers):
        return PreferenceRow(question, tuple(answer[len(question) :] for answer in answers))
    if may_repeat and all(answer and answer[0]["role"] in ("system", "user") for answer in answers):
        return split_conversations(*answers)
    return PreferenceRow(question, tuple(answers))


def implicit_prompt(example: Example) -> PreferenceRow:
    """Both sides whole: HH transcripts, messages, or text. The prompt is their common start."""
    chosen, rejected = example["chosen"], example["rejected"]
    if holds_messages(chosen) or holds_messages(rejected):
        sides = [as_messages(side, "assistant", "response") for side in (chosen, rejected)]
        return split_conversations(*sides)
    chosen, rejected = as_text(chosen, "response"), as_text(rejected, "response")
    start = _common_transcript(chosen, rejected) or _common_text(chosen, rejected)
    return PreferenceRow(start, (chosen[len(start) :], rejected[len(start) :]))


def ranked(example: Example) -> PreferenceRow:
    """A prompt with any number of responses and a score of each: one group, see `ranked_row`."""
    prompt, responses, scores = example["prompt"], example["responses"], example["scores"]
    if not isinstance(responses, list) or not isinstance(scores, list) or len(responses) != len(scores):
        raise BadRow("responses and scores are not lists of one length")
    if not any(holds_messages(value) for value in (prompt, *responses)):
        return ranked_row(as_text(prompt, "prompt"), [as_text(r, "response") for r in responses], scores)
    return ranked_row(
        as_messages(prompt, "user", "prompt"), [as_messages(r, "assistant", "response") for r in responses], scores
    )


def ranked_row(prompt: str | list[Message], responses: Sequence[Any], scores: Sequence[Any]) -> PreferenceRow:
    """The group of a prompt and its responses, best first, where each is preferred to all of a lower score.

    Left out: responses that are empty or have no score, repetitions of a better one. Equal scores make no pair.

    Raises:
        BadRow: no response is better than another.
    """
    known = [(float(score), response) for response, score in zip(responses, scores, strict=True) if _is_number(score)]
    known.sort(key=lambda pair: -pair[0])  # stable: equal scores stay in the order of the dataset
    kept: list[tuple[float, Any]] = []
    for score, response in known:
        if not is_empty(response) and all(response != other for _, other in kept):
            kept.append((score, response))
    pairs = [(i, j) for i in range(len(kept)) for j in range(i + 1, len(kept)) if kept[i][0] > kept[j][0]]
    if not pairs:
        raise BadRow("no response is better than another")
    return PreferenceRow(prompt, tuple(response for _, response in kept), tuple(pairs))


def is_empty(response: str | list[Message]) -> bool:
    if isinstance(response, str):
        return not response.strip()
    return not any(message["content"].strip() or message.get("tool_calls") for message in response)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# --- supervised fine-tuning -------------------------------------------------------------------------------------------


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
    return _last_answer(share_gpt_prompt(example))


def alpaca_sft(example: Example) -> PreferenceRow:
    """A task, optionally its input, and its output."""
    return PreferenceRow(task_prompt(example), (as_text(example["output"], "response"),), preferences=())


def text_sft(example: Example) -> PreferenceRow:
    """Plain text: no prompt, every token is learnt."""
    return PreferenceRow("", (as_text(example["text"], "response"),), preferences=())


# --- text -------------------------------------------------------------------------------------------------------------


def task_prompt(example: Example) -> str:
    """Alpaca's headings, without its preamble: the same words before every task would only cost tokens. A system prompt
    stands in front without a name.

    Raises:
        BadRow: earlier turns, LLaMA-Factory's `history`, for which there is no heading.
    """
    if example.get("history"):
        raise BadRow("earlier turns beside an instruction")
    system = as_text(example.get("system") or "", "prompt")
    task, task_input = as_text(example["instruction"], "prompt"), as_text(example.get("input") or "", "prompt")
    middle = f"### Input:\n{task_input}\n\n" if task_input else ""
    start = f"{system}\n\n" if system else ""
    return f"{start}### Instruction:\n{task}\n\n{middle}### Response:\n"


def as_transcript(row: PreferenceRow) -> PreferenceRow:
    """Messages as text in the manner of HH, for tokenizers without a chat template: what the original release of DPO
    did with HH, SHP and Stack Exchange. A system message stands in front without a name."""
    names = {"user": f"{HUMAN_TURN} ", "assistant": f"{ASSISTANT_TURN} "}

    def text(messages: Any) -> str:
        return "".join(names.get(message["role"], "") + message["content"] for message in messages)

    start = f"{text(row.prompt)}{ASSISTANT_TURN}"
    responses = tuple(text(response).removeprefix(ASSISTANT_TURN) for response in row.responses)
    return PreferenceRow(start, responses, row.preferences)


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


# --- messages ---------------------------------------------------------------------------------------------------------


def share_gpt_prompt(example: Example) -> list[Message]:
    """The messages of `conversations`, after the one of `system` where there is one."""
    system = example.get("system")
    start = [{"role": "system", "content": as_text(system, "prompt")}] if system else []
    return start + as_messages(example["conversations"], "user", "prompt")


def split_conversations(chosen: list[Message], rejected: list[Message]) -> PreferenceRow:
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


EXPLICIT = RowFormat("explicit", ("prompt", "chosen", "rejected"), explicit_prompt)
RANKED = RowFormat("ranked", ("prompt", "responses", "scores"), ranked, may_be_transcript=True)
FORMS = (RANKED, RowFormat("implicit", ("chosen", "rejected"), implicit_prompt))
SFT_FORMS = (
    RowFormat("prompt_completion", ("prompt", "completion"), prompt_completion),
    RowFormat("messages", ("messages",), messages_sft),
    RowFormat("sharegpt", ("conversations",), conversations_sft),
    RowFormat("alpaca", ("instruction", "output"), alpaca_sft),
    RowFormat("text", ("text",), text_sft),
)
