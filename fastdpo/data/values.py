"""From one cell of a dataset to text or messages, the fault of a row that has neither, and what a format is.

In: text, one message or a list of them; a message has role/content or ShareGPT's from/value, its content is text or a
list of parts of type text. Out: str, or [{"role": ..., "content": str, further keys that are not None}].
Refused with BadRow: everything else. Refused with ValueError: images, video and audio.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastdpo.types import Message, PreferenceRow

Example = Mapping[str, Any]

ROLES = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}  # ShareGPT's names
MEDIA_KINDS = ("image", "video", "audio", "input_image", "input_audio")


class BadRow(ValueError):
    """One row that cannot be used. `reason` is the same for all rows with that fault, so that it can be counted."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class RowFormat:
    """A known set of columns and the function that reads them. Several may have one name: releases of one dataset."""

    name: str  # what `dataset_format` takes
    columns: tuple[str, ...]  # what `read` needs
    read: Callable[[Example], PreferenceRow]
    signature: tuple[str, ...] = ()  # further columns by which it is recognised without being named
    by_name_only: bool = False
    may_be_transcript: bool = False  # a tokenizer without chat template gets its messages as Human: and Assistant:
    regroup: Callable[[Iterable[Example]], Iterator[Example]] | None = None  # where rows of the file are not prompts

    def fits(self, example: Example) -> bool:
        return all(column in example for column in self.columns)

    def is_unmistakable(self, example: Example) -> bool:
        return not self.by_name_only and self.fits(example) and all(column in example for column in self.signature)


def as_text(value: Any, field: str) -> str:
    """`value`, if it is text that can be encoded; JSON's escapes can spell half a surrogate pair, which cannot."""
    if not isinstance(value, str):
        raise BadRow(f"{field} is not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRow(f"{field} is not valid Unicode") from None
    return value


def holds_messages(value: Any) -> bool:
    """Whether `value` is one message or a list of them, rather than text."""
    return isinstance(value, (list, Mapping))


def as_messages(value: Any, role: str, field: str) -> list[Message]:
    """Messages from a list of them, from one message, or from text that `role` says; `field` names them in BadRow."""
    return [_message(item, role, field) for item in (value if isinstance(value, list) else [value])]


def without_nones(value: Any) -> Any:
    """Arrow fills the keys that a row lacks with None; templates would take them as given."""
    if isinstance(value, Mapping):
        return {k: without_nones(v) for k, v in value.items() if v is not None}
    return [without_nones(item) for item in value] if isinstance(value, list) else value


def best_response(preferences: Sequence[Sequence[int]]) -> int:
    """The response with the most comparisons won beyond those lost, the first of several; 0 where none is compared."""
    lead: dict[int, int] = {}
    for chosen, rejected in preferences:
        lead[chosen] = lead.get(chosen, 0) + 1
        lead[rejected] = lead.get(rejected, 0) - 1
    return max(sorted(lead), key=lambda response: lead[response], default=0)


def common_prefix_length(items: Sequence[Any], other: Sequence[Any]) -> int:
    """Number of leading characters, messages or tokens that both share."""
    for position, (a, b) in enumerate(zip(items, other, strict=False)):
        if a != b:
            return position
    return min(len(items), len(other))


def _message(value: Any, role: str, field: str) -> Message:
    if not isinstance(value, Mapping):
        return {"role": role, "content": as_text(value, field)}
    speaker = value.get("role") or value.get("from")
    if not isinstance(speaker, str):
        raise BadRow("message without role")
    rest = {k: v for k, v in value.items() if k not in ("role", "content", "from", "value", "loss_weight")}
    content = value.get("value") if value.get("content") is None else value["content"]
    if content is None and rest.get("tool_calls"):
        content = ""
    return {"role": ROLES.get(speaker, speaker), "content": _content(content, field), **without_nones(rest)}


def _content(value: Any, field: str) -> str:
    """Text, or the joined text of parts {"type": "text", "text" or "value": "..."}."""
    if not isinstance(value, list):
        return as_text(value, field)
    kinds = {str(part.get("type")) if isinstance(part, Mapping) else type(part).__name__ for part in value}
    if any(kind.startswith(MEDIA_KINDS) for kind in kinds):
        raise ValueError(
            f"message content must be text, got parts of type {sorted(kinds)}; vision and audio models are unsupported"
        )
    if kinds - {"text"}:
        raise BadRow(f"{field} is not text")
    texts = [part.get("value") if part.get("text") is None else part["text"] for part in value]
    return "".join(as_text(text, field) for text in texts)
