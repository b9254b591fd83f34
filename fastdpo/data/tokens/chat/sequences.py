"""From the tokens of rendered conversations to prompt, sequences and masks.

In: a `Chat` and the tokens of its texts. Out: the prompt with one BOS, whole conversations with their last turn closed,
and, if a response has several messages, a mask of the assistant's tokens: those that the template marks
(`{% generation %}`), or else those found by rendering prefixes (`turns`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fastdpo.data.tokens.chat.conversations import Chat
from fastdpo.data.tokens.chat.planning import ChatPlanner
from fastdpo.data.tokens.chat.rendering import Span
from fastdpo.data.tokens.encoding import Ids, TextEncoder
from fastdpo.data.tokens.notes import STAYED, Note
from fastdpo.data.tokens.turns import assistant_mask
from fastdpo.types import Message


class ChatSequences:
    """Sequences and masks of the chats of one planner."""

    def __init__(self, texts: TextEncoder, planner: ChatPlanner) -> None:
        self.texts, self.planner = texts, planner
        self._bos, self._eos = texts.tokenizer.bos_token_id, texts.tokenizer.eos_token_id

    def of(self, chat: Chat, ids: list[Ids]) -> tuple[Ids, list[Ids], list[list[bool]] | None]:
        """Prompt, whole conversations, and their masks if a response has several messages.

        Args:
            ids: tokens of `chat.texts`; none if the texts are marked or the tokenizer itself made the tokens.
        """
        offsets: list[list[Span]] = []
        if chat.ids:
            ids = chat.ids
        elif chat.is_marked:
            found = [self.texts.encode_marked(text, with_offsets=bool(chat.spans)) for text in chat.texts]
            ids, offsets = [one.ids for one in found], [one.offsets for one in found[1:]]
            if any(one.stayed for one in found):
                chat.notes.append(Note(STAYED))
        elif chat.spans:
            located = [self.texts.encode_with_offsets(text) for text in chat.texts[1:]]
            ids, offsets = [ids[0], *(some for some, _ in located)], [where for _, where in located]
        prompt, *sequences = [self._with_one_bos(some) for some in ids]
        closed = [self._close_turn(sequence) for sequence in sequences]
        if not chat.has_turns:
            return prompt, closed, None
        if not chat.spans:
            render = self._render(chat)
            pairs = zip(chat.wholes, closed, strict=True)
            masks = [
                assistant_mask(messages, chat.num_prompt, ids, render, self.texts.decode) for messages, ids in pairs
            ]
            return prompt, closed, masks
        masks = []
        for number, sequence in enumerate(sequences):
            marks = in_spans(offsets[number], chat.spans[number])[-len(sequence) :]
            is_end_counted = chat.wholes[number][-1]["role"] == "assistant"
            masks.append(marks + [is_end_counted] * (len(closed[number]) - len(sequence)))
        return prompt, closed, masks

    def _render(self, chat: Chat) -> Callable[..., Ids]:
        """Renders a prefix of the chat's conversation to tokens."""
        planner = self.planner

        def render(messages: Sequence[Message], add_generation_prompt: bool = False) -> Ids:
            if planner.code is not None:
                return planner.code.ids(messages, chat.kwargs, add_generation_prompt=add_generation_prompt)
            options = {"add_generation_prompt": add_generation_prompt}
            text = planner.template.render([messages], chat.kwargs, **options)[0].text
            ids = self.texts.encode_marked(text).ids if chat.is_marked else self.texts.encode([text])[0]
            return self._with_one_bos(ids)

        return render

    def _with_one_bos(self, ids: Ids) -> Ids:
        while self._bos is not None and ids[:2] == [self._bos, self._bos]:
            ids = ids[1:]
        return ids

    def _close_turn(self, ids: Ids) -> Ids:
        """`ids`, with an EOS unless the template ends the turn with a special token (EOS, <|im_end|>).

        White space after this token stays, as in TRL: many templates end in EOS and a newline.
        """
        for last in reversed(ids):
            if not self.texts.is_blank(last):
                if self.texts.is_control(last):
                    return ids
                break
        return ids if self._eos is None else [*ids, self._eos]


def in_spans(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Mask of the tokens with a character in one of the spans; both lists are in order."""
    marks = [False] * len(offsets)
    spans = [span for span in spans if span[1] > span[0]]
    number = 0
    for token, (start, end) in enumerate(offsets):
        while number < len(spans) and start >= spans[number][1]:
            number += 1
        if number == len(spans):
            break
        marks[token] = end > spans[number][0]
    return marks
