"""From a row of text to tokens.

In: a row of text. Out: prompt and whole sequences, each with the tokenizer's leading tokens, the sequences with one EOS
at the end; masks if the user speaks in a response.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastdpo.data.tokens.encoding import Ids, TextEncoder
from fastdpo.data.tokens.notes import PLAIN_TEXT, SPELLED, Note
from fastdpo.data.tokens.turns import has_several_turns, transcript_mask
from fastdpo.types import PreferenceRow


@dataclass(frozen=True)
class TextPlan:
    """The texts of a row to tokenize: the prompt and the whole texts."""

    texts: list[str]
    is_marked: bool  # by `control`
    notes: list[Note]


class TextRows:
    """Rows of text for one tokenizer.

    Args:
        has_template: whether the tokenizer has a chat template, which is not applied to text.
    """

    def __init__(self, texts: TextEncoder, *, has_template: bool) -> None:
        self.texts = texts
        self._has_template = has_template
        tokenizer = texts.tokenizer
        self._ends = (tokenizer.bos_token, tokenizer.eos_token)
        self._bos, self._eos = tokenizer.bos_token_id, tokenizer.eos_token_id

    def plan(self, row: PreferenceRow) -> TextPlan:
        """Prompt and whole texts, unchanged: special tokens in them are control tokens, except markup inside a line
        (`control`)."""
        control = self.texts.control
        texts = [str(row.prompt), *(f"{row.prompt}{response}" for response in row.responses)]
        notes = [Note(PLAIN_TEXT)] if self._has_template else []
        is_marked = False
        if any(map(control.are_in, texts)):
            marked = [control.mark_markup(text) for text in texts]
            is_marked = marked != texts
            texts = marked
            inside = [self._without_ends(text) for text in texts[1:]]
            names = dict.fromkeys(name for text in inside for name in control.found_outside_marks(text))
            notes += [Note(SPELLED, name) for name in names]
        return TextPlan(texts, is_marked, notes)

    def _without_ends(self, text: str) -> str:
        """A text without a BOS at its start and an EOS at its end."""
        for token in self._ends:
            text = text.removeprefix(token or "").removesuffix(token or "")
        return text

    def tokens(
        self, row: PreferenceRow, plan: TextPlan, ids: list[Ids]
    ) -> tuple[Ids, list[Ids], list[list[bool]] | None]:
        """Prompt and whole sequences, each with the tokenizer's leading tokens; sequences end in one EOS.

        The sequences get masks if the user speaks in a response, as in HH transcripts that differ early.
        """
        if plan.is_marked:
            ids = [self.texts.encode_marked(text).ids for text in plan.texts]
        prompt, *sequences = (self._begin_once(text_ids) for text_ids in ids)
        sequences = [self._end_once(sequence) for sequence in sequences]
        if not has_several_turns(row):
            return prompt, sequences, None

        def encode(text: str) -> Ids:
            return self._begin_once(self.texts.encode([text])[0])

        pairs = zip(row.responses, sequences, strict=True)
        return prompt, sequences, [transcript_mask(str(row.prompt), str(text), ids, encode) for text, ids in pairs]

    def _begin_once(self, ids: Ids) -> Ids:
        """The tokenizer's leading tokens followed by `ids`, without a second BOS if the text itself starts with one."""
        first = self.texts.leading_ids()
        while first and first[-1] == self._bos and ids and ids[0] == self._bos:
            ids = ids[1:]
        return first + ids

    def _end_once(self, ids: Ids) -> Ids:
        """`ids` with exactly one EOS at the end, if the tokenizer has an EOS."""
        if self._eos is None:
            return ids
        end = len(ids)
        while end > 0 and ids[end - 1] == self._eos:
            end -= 1
        return [*ids[:end], self._eos]
