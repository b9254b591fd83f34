"""From one cell to messages with roles and text in the form that chat templates take.

In: one message or a list of messages; a message has role and content, or ShareGPT's from and value, or is an object of
turns such as {"human": ..., "assistant": ...}. Out: [{"role": ..., "content": str, further keys that are not None}].
Refused with BadRow: an unknown role, content parts that are not text. Refused with ValueError: images, video and audio.

Content that is not text, such as a tool's result {"temp": 20}, becomes its JSON text; missing content becomes "". The
data inside a call is unchanged, nulls included.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastdpo.data.forms.json_text import CONTENT_KEYS, ROLE_KEYS, json_list, messages_in
from fastdpo.data.forms.roles import known_role, role_of
from fastdpo.data.values import BadRow, as_text
from fastdpo.types import Message

MEDIA_KINDS = ("image", "video", "audio", "input_image", "input_audio")
_PLAIN = {"role", "content"}
TEXT_KINDS = ("text", "input_text", "output_text")
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking", "thought")
# metadata of exports that no template shows: different ids would make equal messages of two sides differ
UNREAD_KEYS = (
    *("loss_weight", "weight", "id", "message_id", "timestamp", "created_at", "date", "model", "num_tokens"),
    *("token_count", "metadata", "language", "toxicity", "redacted", "hashed_ip", "header", "state", "country"),
)


def as_messages(value: Any, role: str, field: str) -> list[Message]:
    """Messages from a list, from one message, or from text spoken by `role`; `field` names them in BadRow."""
    value = messages_in(value, field)
    return [
        message for item in (value if isinstance(value, list) else [value]) for message in _turns(item, role, field)
    ]


def earlier_turns(value: Any, field: str) -> list[Message]:
    """Messages from a list of messages, of pairs (question, answer), or of texts by user and assistant in turn."""
    items = value if isinstance(value, list) else [value]
    if items and all(isinstance(item, str) for item in items):
        return _in_turn(items, field)
    messages: list[Message] = []
    for item in items:
        messages += _in_turn(item, field) if isinstance(item, (list, tuple)) else _turns(item, "user", field)
    return messages


def is_empty(response: str | Sequence[Message]) -> bool:
    """Whether the answer is empty: no text, no call, no thought."""
    if isinstance(response, str):
        return not response.strip()
    return not any(
        message["content"].strip() or message.get("tool_calls") or any(message.get(key) for key in THOUGHT_KEYS)
        for message in response
    )


def same_message(message: Message, other: Message) -> bool:
    """Whether two messages are equal, ignoring surrounding white space."""
    return (
        message["role"] == other["role"]
        and message["content"].strip() == other["content"].strip()
        and message.get("tool_calls") == other.get("tool_calls")
    )


def _in_turn(texts: Sequence[Any], field: str) -> list[Message]:
    """[question, answer, question, ...]; a missing answer is skipped."""
    roles = ("user", "assistant")
    return [
        {"role": roles[position % 2], "content": _content(text, roles[position % 2], field)}
        for position, text in enumerate(texts)
        if text is not None
    ]


def _turns(value: Any, role: str, field: str) -> list[Message]:
    """The message in `value`; from an object without a role, one message per key that names a role."""
    if isinstance(value, dict) and value.keys() == _PLAIN and isinstance(value["content"], str):  # nearly all are
        return [{"role": role_of(value["role"]), "content": as_text(value["content"], field)}]
    if not isinstance(value, Mapping):
        return [{"role": role, "content": as_text(value, field)}]
    speaks = next((key for key in ROLE_KEYS if value.get(key)), None)
    speaker = None if speaks is None else value[speaks]
    if isinstance(speaker, Mapping):  # ChatGPT's exports: {"author": {"role": ...}}
        speaker = speaker.get("role")
    if speaker is None and value and all(known_role(key) for key in value):
        return [
            {"role": role_of(key), "content": _content(said, role_of(key), field)}
            for key, said in value.items()
            if said is not None
        ]
    return [_message(value, role_of(speaker), field, speaks)]


def _message(value: Mapping[str, Any], role: str, field: str, role_key: str | None) -> Message:
    content_key = next((key for key in CONTENT_KEYS if value.get(key) is not None), None)
    left_out = (role_key, content_key, *UNREAD_KEYS)
    kept = {key: item for key, item in value.items() if item is not None and key not in left_out}
    if "function_call" in kept:  # OpenAI's older name of a single call
        kept.setdefault("tool_calls", [{"type": "function", "function": kept["function_call"]}])
        del kept["function_call"]
    if "tool_calls" in kept:
        kept["tool_calls"] = json_list(kept["tool_calls"], "tool_calls")
        if not kept["tool_calls"]:
            del kept["tool_calls"]
    said = None if content_key is None else value[content_key]
    return {"role": role, "content": _content(said, role, field), **kept}


def _content(value: Any, role: str, field: str) -> str:
    """Text, the joined text of parts {"type": "text", "text" or "value": "..."}, or the JSON text of anything else."""
    if value is None:
        return ""
    if isinstance(value, str):
        return as_text(value, field)
    parts = value if isinstance(value, list) else [value]
    kinds = {str(part["type"]) for part in parts if isinstance(part, Mapping) and part.get("type") is not None}
    if any(kind.startswith(MEDIA_KINDS) for kind in kinds):
        raise ValueError(
            f"message content must be text, got parts of type {sorted(kinds)}; vision and audio models are unsupported"
        )
    if parts and all(isinstance(part, Mapping) and part.get("type") in TEXT_KINDS for part in parts):
        return "".join(as_text(_part_text(part), field) for part in parts)
    if kinds and role != "tool" and isinstance(value, list):
        raise BadRow(f"{field} has parts of type {', '.join(sorted(kinds - set(TEXT_KINDS)) or ['none'])}")
    if parts and isinstance(value, list) and all(isinstance(part, str) for part in parts):
        return "".join(as_text(part, field) for part in parts)
    return as_text(json.dumps(value, ensure_ascii=False, default=str), field)


def _part_text(part: Mapping[str, Any]) -> Any:
    return next((part[key] for key in ("text", "value", "content") if part.get(key) is not None), None)
