"""From a `PreferenceRow` to a `TokenizedGroup`.

Two steps: `RowEncoder` (chat template, one BOS, one EOS, prompt tokens that are a prefix of every sequence) and
`truncate` (`max_prompt_length`, then `max_length`); `tokenize_row` is the two together for one row. A row that cannot
be used raises BadRow; messages for a tokenizer without a chat template are a ValueError.

Rows are encoded many at a time: messages are rendered (`chat`), text is used unchanged (`text_rows`), and all texts are
tokenized together (`encoding`).

The tokens equal those of TRL 1.16's DPOTrainer, except for these improvements: BOS and EOS are never duplicated, an EOS
is added if the template leaves the last turn open, only the assistant's tokens count in a response of several turns
(`turns`), special tokens that a message spells out are text (`control`), an assistant turn at the end of the prompt is
continued, and rows without a usable difference are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastdpo.data.forms import is_empty
from fastdpo.data.tokens.chat.conversations import Chat
from fastdpo.data.tokens.chat.planning import ChatPlanner
from fastdpo.data.tokens.chat.rendering import has_chat_template
from fastdpo.data.tokens.chat.sequences import ChatSequences
from fastdpo.data.tokens.encoding import Ids, TextEncoder
from fastdpo.data.tokens.notes import LOST, UNKNOWN, Note
from fastdpo.data.tokens.settings import TokenizationSettings
from fastdpo.data.tokens.text_rows import TextPlan, TextRows
from fastdpo.data.tokens.truncation import EQUAL, checked_group, different_pairs, truncate
from fastdpo.data.values import BadRow, common_prefix_length
from fastdpo.types import Message, PreferenceRow, TokenizedGroup

__all__ = [
    "EncodedRow",
    "RowEncoder",
    "TokenizationSettings",
    "encode_row",
    "padding_id",
    "tokenize_row",
    "truncate",
    "usable_preferences",
]

_DECODED_ROWS = 8  # compared with their text, token by token


@dataclass(frozen=True)
class EncodedRow:
    """An encoded row: its tokens, or the error that prevents them, and its notes."""

    group: TokenizedGroup | None = None
    error: ValueError | None = None  # BadRow, or an error of the whole dataset
    is_merged: bool = False  # the end of the prompt alone is tokenized differently than with a response
    notes: list[Note] = field(default_factory=list)


def tokenize_row(
    row: PreferenceRow,
    tokenizer: Any,
    settings: TokenizationSettings,
    template_kwargs: dict[str, Any] | None = None,
) -> TokenizedGroup:
    """The row as tokens, truncated to the run's lengths.

    Args:
        tokenizer: a transformers tokenizer; with a chat template if the row is conversational.
        template_kwargs: further arguments for the chat template, such as `tools`.
    Raises:
        BadRow: the row cannot be used; `.reason` says why.
        ValueError: the row is conversational and the tokenizer has no chat template.
    """
    encoder = RowEncoder(tokenizer, settings.chat_template, settings.chat_template_kwargs)
    return truncate(_group_of(encoder.encode([(row, template_kwargs or {})])[0]), settings)


def usable_preferences(row: PreferenceRow) -> tuple[tuple[int, int], ...]:
    """The preferences of a row between different responses: what can be told before a tokenizer is known.

    Raises:
        BadRow: a response is empty, or no two that are compared differ.
    """
    for response in row.responses:
        if is_empty(response):
            raise BadRow("empty response")
    return different_pairs(row.preferences, row.responses, EQUAL)


def padding_id(tokenizer: Any) -> int:
    """The token for padding: the tokenizer's padding token, or its EOS if it has none."""
    pad_id: int = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return pad_id


def encode_row(
    row: PreferenceRow, tokenizer: Any, template_kwargs: dict[str, Any] | None = None
) -> tuple[TokenizedGroup, bool]:
    """The whole row as tokens, and whether the end of the prompt is tokenized differently alone and with a response.

    In that case the differing tokens belong to the response: if "ab" is one token, prompt "a" and response "b" give an
    empty prompt and the response ("ab",). The same holds for templates that render the prompt alone differently.
    """
    encoded = RowEncoder(tokenizer).encode([(row, template_kwargs or {})])[0]
    return _group_of(encoded), encoded.is_merged


def _group_of(encoded: EncodedRow) -> TokenizedGroup:
    if encoded.error is not None:
        raise encoded.error
    assert encoded.group is not None
    return encoded.group


class RowEncoder:
    """Encodes rows with one tokenizer and one chat template, and caches facts about them."""

    def __init__(
        self, tokenizer: Any, chat_template: str | None = None, template_kwargs: dict[str, Any] | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.texts = TextEncoder(tokenizer)
        self.chats = ChatPlanner(self.texts, chat_template)
        self.sequences = ChatSequences(self.texts, self.chats)
        self.template_kwargs = dict(template_kwargs or {})
        self._has_template = has_chat_template(tokenizer) or chat_template is not None
        self.text_rows = TextRows(self.texts, has_template=self._has_template)
        self._unknown = _unknown_id(tokenizer)
        self._num_to_decode = _DECODED_ROWS

    def takes_messages(self, template_kwargs: dict[str, Any]) -> bool:
        """Whether there is a template for messages of a row with these arguments."""
        return self._has_template or "chat_template" in {**self.template_kwargs, **template_kwargs}

    def encode(self, rows: Sequence[tuple[PreferenceRow, dict[str, Any]]]) -> list[EncodedRow]:
        """The rows as tokens.

        Args:
            rows: each with its own arguments for the chat template, which override the run's.
        """
        plans: list[TextPlan | Chat | ValueError | None] = [self._plan(row) for row, _ in rows]
        of_messages = [number for number, plan in enumerate(plans) if plan is None]
        jobs = [
            (rows[number][0], {**self.template_kwargs, **rows[number][1]}, side_names(rows[number][0]))
            for number in of_messages
        ]
        for number, chat in zip(of_messages, self.chats.plan(jobs), strict=True):
            plans[number] = chat
        ids = iter(self.texts.encode_rows([_to_tokenize(plan) for plan in plans]))
        return [self._finished(row, plan, next(ids)) for (row, _), plan in zip(rows, plans, strict=True)]

    def _finished(self, row: PreferenceRow, plan: TextPlan | Chat | ValueError | None, ids: list[Ids]) -> EncodedRow:
        """The row with its tokens."""
        if plan is None or isinstance(plan, ValueError):
            return EncodedRow(error=plan)
        notes = plan.notes
        try:
            if isinstance(plan, Chat):
                prompt, sequences, masks = self.sequences.of(plan, ids)
            else:
                prompt, sequences, masks = self.text_rows.tokens(row, plan, ids)
            notes += self._unknown_characters(row, plan, sequences)
            num_prompt = min(_num_shared(prompt, sequence) for sequence in sequences)
            responses = [sequence[num_prompt:] for sequence in sequences]
            if any(len(response) == 0 for response in responses):  # a template that leaves the response out
                raise BadRow("empty response")
            if masks is not None:
                masks = [mask[num_prompt:] for mask in masks]
            lost = {note.what: None for note in notes if note.kind == LOST and note.side != "prompts"}
            equal = f"{EQUAL} but for {' and '.join(lost)}, which the chat template leaves out" if lost else EQUAL
            preferences = different_pairs(row.preferences, row.responses, EQUAL)
            group = checked_group(prompt[:num_prompt], responses, masks, preferences, equal)
        except ValueError as error:
            return EncodedRow(error=error, notes=notes)
        return EncodedRow(group, None, num_prompt < len(prompt), notes)

    def _plan(self, row: PreferenceRow) -> TextPlan | ValueError | None:
        """The plan for a row of text; the error if the row is unusable; None if the row holds messages."""
        try:
            usable_preferences(row)
            if any(is_empty(self._without_end(response)) for response in row.responses):
                raise BadRow("empty response")
        except BadRow as error:
            return error
        return None if row.is_conversational else self.text_rows.plan(row)

    def _without_end(self, response: str | Sequence[Message]) -> str | list[Message]:
        """A response without the text of EOS, which is no answer by itself: every answer ends in EOS."""
        end = self.tokenizer.eos_token or ""
        if isinstance(response, str):
            return response.replace(end, "")
        return [{**message, "content": message["content"].replace(end, "")} for message in response]

    def _unknown_characters(self, row: PreferenceRow, plan: TextPlan | Chat, sequences: list[Ids]) -> list[Note]:
        """Notes on sides with characters that the tokenizer does not know; in the first rows, on every side that does
        not decode to its text, ignoring white space."""
        names = side_names(row)
        if self._unknown is not None and any(self._unknown in sequence for sequence in sequences):
            return [
                Note(UNKNOWN, "characters", n) for n, ids in zip(names, sequences, strict=True) if self._unknown in ids
            ]
        if self._num_to_decode <= 0 or plan.is_marked:
            return []
        self._num_to_decode -= 1
        notes = []
        for name, text, ids in zip(names, plan.texts[1:], sequences, strict=True):
            wanted, decoded = self._characters(text), self._characters(self.texts.decode(ids))
            if wanted not in decoded:
                notes.append(Note(UNKNOWN, "characters", name, _difference(wanted, decoded)))
        return notes

    def _characters(self, text: str) -> str:
        """A text without white space, and without any BOS and EOS at its ends."""
        for token in (self.tokenizer.bos_token, self.tokenizer.eos_token):
            text = text.replace(token, "") if token else text
        return "".join(text.split())


def _to_tokenize(plan: TextPlan | Chat | ValueError | None) -> list[str]:
    """The texts of a row that are tokenized in one batch with those of other rows."""
    if plan is None or isinstance(plan, ValueError) or plan.is_marked or (isinstance(plan, Chat) and plan.ids):
        return []
    return plan.texts


def side_names(row: PreferenceRow) -> tuple[str, ...]:
    """The names of a row's responses in a report."""
    if len(row.responses) == 2 and tuple(row.preferences) == ((0, 1),):
        return ("chosen", "rejected")
    return ("responses",) * len(row.responses)


def _unknown_id(tokenizer: Any) -> int | None:
    """The id of the unknown token; None if there is none, or if it is also BOS, EOS or padding, as in GPT-2."""
    unknown: int | None = getattr(tokenizer, "unk_token_id", None)
    return None if unknown in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) else unknown


def _num_shared(prompt: Ids, sequence: Ids) -> int:
    """Number of prompt tokens at the start of the sequence."""
    return len(prompt) if sequence[: len(prompt)] == prompt else common_prefix_length(prompt, sequence)


def _difference(text: str, decoded: str) -> str:
    """The first difference between a text and its decoded tokens."""
    start = common_prefix_length(text, decoded)
    return f"{text[start : start + 20]!r} is {decoded[start : start + 20]!r}"
