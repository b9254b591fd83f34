"""Helpers of the adapters: questions and answers as messages, parsers for transcripts and HTML."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html.parser import HTMLParser
from typing import Any

from fastdpo.data.forms.rankings import ranked_row
from fastdpo.data.values import BadRow, as_text
from fastdpo.types import Message, PreferenceRow

_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_BLOCKS = ("p", "pre", "li", "blockquote", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "div", "tr", "br", "hr")


def user(text: Any) -> Message:
    return {"role": "user", "content": as_text(text, "prompt")}


def assistant(text: Any) -> list[Message]:
    return [{"role": "assistant", "content": as_text(text, "response")}]


def system(text: Any) -> list[Message]:
    """A list of one system message, or an empty list if the dataset has no text for it."""
    return [{"role": "system", "content": as_text(text, "prompt")}] if text else []


def better_first(prompt: list[Message], first: Any, second: Any, lead: float) -> PreferenceRow:
    """The pair of two answers.

    Args:
        lead: positive where the first is better, negative where the second is.
    Raises:
        BadRow: neither is.
    """
    if not isinstance(lead, int | float) or isinstance(lead, bool) or lead == 0 or lead != lead:
        raise BadRow("no response is better than another")
    answers = (assistant(first), assistant(second))
    return PreferenceRow(prompt, answers if lead > 0 else answers[::-1])


def ranked_answers(prompt: list[Message], answers: Sequence[Any], scores: Sequence[Any]) -> PreferenceRow:
    """The group of answers given as text; see `ranked_row`. An answer that is not text counts as empty."""
    return ranked_row(prompt, [assistant(a if isinstance(a, str) else "") for a in answers], scores)


def transcript_messages(text: Any) -> list[Message]:
    """The turns of a "\\n\\nHuman: ... \\n\\nAssistant: ..." text; consecutive turns of one speaker become one message.

    An empty last turn, as in a prompt that ends in "Assistant:", is dropped.

    Raises:
        BadRow: the text does not begin with such a turn.
    """
    before, *turns = _TURN.split("\n\n" + as_text(text, "transcript").strip())
    if before.strip() or not turns:
        raise BadRow("not a transcript of Human: and Assistant:")
    messages: list[Message] = []
    for speaker, said in zip(turns[::2], turns[1::2], strict=True):
        role = "user" if speaker == "Human" else "assistant"
        if not said.strip():
            continue
        if messages and messages[-1]["role"] == role:
            messages[-1] = {"role": role, "content": f"{messages[-1]['content']}\n\n{said.strip()}"}
        else:
            messages.append({"role": role, "content": said.strip()})
    return messages


def html_text(html: Any) -> str:
    """The text of an HTML fragment; paragraphs, list items and code blocks stay separate."""
    reader = _TextReader()
    reader.feed(as_text(html, "response"))
    reader.close()
    return re.sub(r"\n{3,}", "\n\n", "".join(reader.pieces)).strip()


class _TextReader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag in _BLOCKS:
            self.pieces.append("\n- " if tag == "li" else "\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in _BLOCKS:
            self.pieces.append("\n")

    def handle_data(self, data: str) -> None:
        self.pieces.append(data)
