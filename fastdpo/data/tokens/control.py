"""Keeps special tokens in messages as text: a special token that a message spells out is tokenized by its characters,
and only the special tokens that the chat template writes are control tokens.

In: text of rows, and rendered conversations in which that text was marked. Out: the marked text; token ids. Marks and
tokens are the same as those of transformers' `sanitize_control_tokens` (since 5.22), but work in every supported
release and come with offsets. Two things differ: tags of thoughts and calls in assistant messages (`<think>`,
`[TOOL_CALLS]`) stay tokens, because data carries them in this form; and if a tokenizer turns even the characters into a
special token, this is reported and not an error.

In plain text, special tokens are control tokens, except `<s>old</s>` in the middle of a sentence: if these are BOS and
EOS, they are markup and tokenized as text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

START, END = "\U000f0000", "\U000f0001"  # marks around text; private-use characters, as in transformers
_SAID_TAGS = re.compile(r"[<\[]/?(think|thinking|thought|reasoning|tool_calls?|tool_responses?)[>\]]", re.IGNORECASE)
_TAG = re.compile(r"</([A-Za-z]\w*)>")


class ControlTokens:
    """The special tokens of a tokenizer, found and marked in text."""

    def __init__(self, tokenizer: Any) -> None:
        names: set[str] = set()
        added = added_tokens(tokenizer)
        if added and not getattr(tokenizer, "split_special_tokens", False):  # else none is ever found in text
            names = set(tokenizer.all_special_tokens) | {token.content for token in added.values() if token.special}
        names = {name for name in names if name.strip()}
        longest_first = sorted(names, key=lambda name: (-len(name), name))
        self._tokens = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._leads = tuple({name[:2] for name in names})  # most texts contain none of these: a fast first check
        marked = f"{START}({self._tokens.pattern}){END}|[{START}{END}]"
        self._marked = re.compile(marked)
        self._markup = markup_pattern(getattr(tokenizer, "bos_token", None), getattr(tokenizer, "eos_token", None))

    def are_in(self, text: str) -> bool:
        """Whether the text spells out a special token."""
        return self.are_in_any((text,))

    def are_in_any(self, texts: Iterable[str]) -> bool:
        """Whether one of the texts spells out a special token."""
        leads = self._leads
        for text in texts:
            for lead in leads:
                if lead in text and self._tokens.search(text) is not None:
                    return True
        return False

    def found_in(self, text: str) -> list[str]:
        """The special tokens that the text spells out, each once."""
        return list(dict.fromkeys(self._tokens.findall(text))) if self.are_in(text) else []

    def found_outside_marks(self, text: str) -> list[str]:
        """Like `found_in`, for the tokens outside the marks of marked text."""
        return self.found_in(self._marked.sub("", text)) if START in text else self.found_in(text)

    def mark(self, text: str, *, is_assistant: bool) -> str:
        """The text with marks around special tokens that must stay text."""
        if not self.are_in(text):
            return text

        def marked(match: re.Match[str]) -> str:
            token = match.group()
            return token if is_assistant and _SAID_TAGS.fullmatch(token) else f"{START}{token}{END}"

        return self._tokens.sub(marked, text.replace(START, "").replace(END, ""))

    def mark_markup(self, text: str) -> str:
        """Plain text with marks around a BOS and EOS that enclose a span inside a line."""
        if self._markup is None or not self.are_in(text):
            return text

        def marked(match: re.Match[str]) -> str:
            before = match.string[: match.start()].rstrip(" \t")
            if not before or before.endswith(("\n", match.group(3))):
                return match.group()  # where a sequence may begin
            opening, inside, closing = match.groups()
            return f"{START}{opening}{END}{inside}{START}{closing}{END}"

        return self._markup.sub(marked, text.replace(START, "").replace(END, ""))

    def pieces(self, chat: str) -> Iterator[Piece]:
        """Marked text, cut at its marks; an unpaired mark only separates the text around it."""
        position = 0
        for match in self._marked.finditer(chat):
            if match.start() > position:
                yield Piece(chat[position : match.start()], position)
            if match.group(1) is not None:
                yield Piece(match.group(1), match.start(1), is_text=True)
            position = match.end()
        if position < len(chat):
            yield Piece(chat[position:], position)


@dataclass(frozen=True)
class Piece:
    """A piece of marked text."""

    text: str
    start: int  # in the marked text
    is_text: bool = False  # spells out a special token and is none


@dataclass
class MarkedTokens:
    """The tokens of marked text."""

    ids: list[int] = field(default_factory=list)
    offsets: list[tuple[int, int]] = field(default_factory=list)  # in the marked text; of a piece as a whole if is_text
    stayed: bool = False  # the tokenizer makes a special token of characters too


def added_tokens(tokenizer: Any) -> dict[int, Any]:
    """The added tokens of a tokenizer by id; empty for tokenizers without them, such as mistral-common's."""
    added = getattr(tokenizer, "added_tokens_decoder", None)
    return dict(added) if isinstance(added, Mapping) else {}


def without_marks(text: str) -> str:
    return text.replace(START, "").replace(END, "")


def markup_pattern(bos: str | None, eos: str | None) -> re.Pattern[str] | None:
    """A pattern for `<s>old</s>` if these are BOS and EOS; None if BOS and EOS are not a pair of tags."""
    tag = _TAG.fullmatch(eos or "")
    if tag is None or bos != f"<{tag.group(1)}>":
        return None
    return re.compile(f"({bos})((?:(?!{bos}|{eos}).)*)({eos})", re.DOTALL)


def ends_in_markup(text: str, eos: str) -> bool:
    """Whether the EOS at the end of a text closes an `<s>` of the text and thus does not end a turn."""
    tag = _TAG.fullmatch(eos)
    if tag is None or not text.endswith(eos):
        return False
    opening = f"<{tag.group(1)}>"
    num_opened = text.count(opening)
    is_wrapped = num_opened == 1 and text.lstrip().startswith(opening)  # a whole answer between BOS and EOS
    return text.count(eos) <= num_opened and not is_wrapped


def encode_marked(control: ControlTokens, chat: str, encode: Any, encode_as_text: Any, token_id: Any) -> MarkedTokens:
    """The tokens of marked text, encoded piece by piece, as in transformers.

    Args:
        encode: (text) -> ids and offsets; special tokens are recognised, nothing is added.
        encode_as_text: (text) -> ids, without recognising added tokens.
        token_id: (token) -> its id.
    """
    result = MarkedTokens()
    newline = encode("\n")[0]
    for number, piece in enumerate(control.pieces(chat)):
        if piece.is_text:
            ids = _behind_newline(piece.text, lambda text: encode_as_text(text), newline)
            result.stayed |= token_id(piece.text) in ids
            offsets = [(piece.start, piece.start + len(piece.text))] * len(ids)
        elif number == 0:
            ids, offsets = encode(piece.text)
            offsets = [(piece.start + start, piece.start + end) for start, end in offsets]
        else:
            ids, offsets = encode("\n" + piece.text)
            moved = piece.start - 1
            if ids[: len(newline)] == newline:
                ids, offsets = ids[len(newline) :], offsets[len(newline) :]
            else:
                (ids, offsets), moved = encode(piece.text), piece.start
            offsets = [(moved + start, moved + end) for start, end in offsets]
        result.ids += ids
        result.offsets += offsets
    return result


def _behind_newline(text: str, encode: Any, newline: list[int]) -> list[int]:
    """The ids of a text that is not the first piece: SentencePiece would otherwise put a space before it."""
    ids: list[int] = encode("\n" + text)
    return ids[len(newline) :] if ids[: len(newline)] == newline else encode(text)
