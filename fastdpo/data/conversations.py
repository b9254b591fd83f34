"""From a row of messages to the texts that are tokenized, and from their tokens to prompt, sequences and masks.

In: a row of messages and the arguments of the chat template. Out: the prompt with the generation prompt, each whole
conversation, rendered once; then their tokens, which of them the assistant says where a response has several messages,
and notes on what the template left out. The template says what BOS there is.

A prompt that ends in the assistant's turn goes on with it: the first message of every response is the rest of that
turn, and nothing opens another one.
Refused with BadRow: no prompt, messages that the template refuses. Refused with ValueError: no chat template.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastdpo.data.control import ends_in_markup, without_marks
from fastdpo.data.encoding import Ids, TextEncoder, common_start
from fastdpo.data.ledger import THOUGHT_KEYS, Ledger, Stock, shown, walk, walk_tools
from fastdpo.data.notes import FIELD, LOST, OPENS, STAYED, Note
from fastdpo.data.rendering import NO_TEMPLATE, ChatCode, ChatTemplate, Span, renders_by_code
from fastdpo.data.templates import FIRST_TRAINED
from fastdpo.data.turns import assistant_mask, has_several_turns
from fastdpo.data.values import BadRow
from fastdpo.types import Message, PreferenceRow


@dataclass(frozen=True)
class Chat:
    """A row of messages on its way to tokens."""

    prompt: list[Message]
    wholes: list[list[Message]]  # the conversation of each response
    num_prompt: int  # messages of each that are the prompt's
    goes_on: bool  # the prompt ends inside the assistant's turn, which is message `num_prompt`
    kwargs: dict[str, Any]
    has_turns: bool  # a response has several messages
    texts: list[str] = field(
        default_factory=list
    )  # to be tokenized: prompt, wholes; none if `ids` or `marked` are there
    marked: list[str] = field(default_factory=list)  # the same with marks, where messages spell out special tokens
    ids: list[Ids] = field(default_factory=list)  # the same as tokens, where a tokenizer renders by code
    spans: list[tuple[Span, ...]] = field(default_factory=list)  # of the wholes, where the template marks them
    notes: list[Note] = field(default_factory=list)


class ConversationPlanner:
    """Renders rows of messages with one tokenizer, and makes sequences and masks of the tokens."""

    def __init__(self, texts: TextEncoder, chat_template: str | None = None) -> None:
        self.texts = texts
        self.tokenizer = texts.tokenizer
        by_code = chat_template is None and renders_by_code(self.tokenizer)
        self.code = ChatCode(self.tokenizer) if by_code else None
        self.template = ChatTemplate(self.tokenizer, chat_template)
        self.ledger = Ledger()
        self._takes_spans = getattr(self.tokenizer, "backend_tokenizer", None) is not None  # which has offsets

    def plan(self, row: PreferenceRow, kwargs: dict[str, Any], sides: Sequence[str]) -> Chat:
        """The row rendered.

        Args:
            sides: what the responses are called in notes.
        """
        if self.code is None and not self.template.is_there(kwargs):
            raise ValueError(NO_TEMPLATE)
        if not row.prompt:
            raise BadRow("empty prompt")
        chat = _as_chat(row, kwargs, self.tokenizer.eos_token)
        stock = Stock(chat.wholes, chat.num_prompt, kwargs.get("tools"))
        plan = self._plan_template if self.code is None else self._plan_code
        return plan(chat, stock, sides)

    # By a template

    def _plan_template(self, chat: Chat, stock: Stock, sides: Sequence[str]) -> Chat:
        kwargs = self._with_first_trained(chat)
        conversations, marked_kwargs = [chat.prompt, *chat.wholes], kwargs
        is_marked = any(map(self.texts.control.are_in, stock.strings()))
        if is_marked:
            conversations, marked_kwargs = self._marked(conversations, kwargs)
        prompt_messages, *wholes = conversations
        prompt = self._prompt_text(prompt_messages, marked_kwargs, chat.goes_on)
        with_spans = chat.has_turns and self._takes_spans and self.template.marks_assistant(kwargs)
        rendered = self.template.render(wholes, marked_kwargs, with_spans=with_spans)
        texts = [prompt, *(whole.text for whole in rendered)]
        plain = [without_marks(text) for text in texts] if is_marked else texts
        notes = self._notes(stock, chat.goes_on, kwargs, plain, sides, self._text)
        return Chat(
            **{**_fields(chat), "kwargs": marked_kwargs},
            texts=[] if is_marked else texts,
            marked=texts if is_marked else [],
            spans=[whole.spans for whole in rendered] if with_spans else [],
            notes=notes,
        )

    def _with_first_trained(self, chat: Chat) -> dict[str, Any]:
        """The arguments, with the number of the first message that is learnt for templates that ask for it."""
        jinja = self.template.jinja(chat.kwargs)
        return {**chat.kwargs, FIRST_TRAINED: chat.num_prompt} if FIRST_TRAINED in jinja else chat.kwargs

    def _marked(
        self, conversations: list[list[Message]], kwargs: dict[str, Any]
    ) -> tuple[list[list[Message]], dict[str, Any]]:
        """Conversations and tools with marks around the special tokens that they spell out."""
        marked = {key: walk_tools(value, self._mark) if key == "tools" else value for key, value in kwargs.items()}
        return [walk(messages, self._mark) for messages in conversations], marked

    def _mark(self, kind: str, text: str) -> str:
        return self.texts.control.mark(text, is_assistant=kind in ("answers", "thoughts", "calls"))

    def _prompt_text(self, messages: list[Message], kwargs: Mapping[str, Any], goes_on: bool) -> str:
        if not goes_on:
            return self.template.render([messages], kwargs, add_generation_prompt=True)[0].text
        try:
            return self.template.render([messages], kwargs, continue_final_message=True)[0].text
        except BadRow:
            self.template.render([messages], kwargs)  # refused altogether, which has a reason of its own
            raise BadRow("the chat template leaves out the assistant's turn that the prompt ends in") from None

    def _text(self, messages: Sequence[Message], kwargs: Mapping[str, Any]) -> str:
        return self.template.render([messages], kwargs)[0].text

    # By code

    def _plan_code(self, chat: Chat, stock: Stock, sides: Sequence[str]) -> Chat:
        assert self.code is not None
        code, decode = self.code, self.tokenizer.decode
        is_asked = chat.prompt[-1]["role"] != "assistant"
        how = {"continue_final_message": chat.goes_on, "add_generation_prompt": is_asked}
        ids = [code.ids(chat.prompt, chat.kwargs, **how), *(code.ids(whole, chat.kwargs) for whole in chat.wholes)]
        texts = [decode(some) for some in ids]

        def render(messages: Sequence[Message], kwargs: Mapping[str, Any]) -> str:
            text: str = decode(code.ids(messages, kwargs))
            return text

        notes = self._notes(stock, chat.goes_on, chat.kwargs, texts, sides, render)
        return Chat(**_fields(chat), ids=ids, notes=notes)

    # What is lost

    def _notes(
        self,
        stock: Stock,
        goes_on: bool,
        kwargs: dict[str, Any],
        texts: Sequence[str],
        sides: Sequence[str],
        render: Callable[[Sequence[Message], Mapping[str, Any]], str],
    ) -> list[Note]:
        """What the template has left out of the prompt and each response, and how the prompt alone ends otherwise."""
        prompt, *wholes = texts
        others = {key: value for key, value in kwargs.items() if key != "tools"}
        key = repr(sorted(others.items())) if others else ""
        notes: dict[tuple[str, str, str], Note] = {}

        def take(note: Note) -> None:
            notes.setdefault((note.kind, note.what, note.side), note)

        def render_words(messages: Sequence[Message], tools: Any) -> str:
            return render(messages, {**others, "tools": tools} if tools else others)

        for number, (side, text) in enumerate(zip(sides, wholes, strict=True)):
            start = 0 if goes_on else len(common_start([prompt, text]))
            before, after, fields = self.ledger.losses(stock, number, text, start, render_words, key)
            for name, losses in (("prompts", before), (side, after)):
                for loss in losses:
                    take(Note(LOST, loss.kind, name, loss.example))
            for name in fields:
                take(Note(FIELD, name))
        shared = common_start(texts)
        if len(shared) < len(prompt):
            take(Note(OPENS, shown(prompt[len(shared) :])))
        return list(notes.values())

    # Tokens

    def tokens(self, chat: Chat, ids: list[Ids]) -> tuple[Ids, list[Ids], list[list[bool]] | None]:
        """Prompt, whole conversations with their turn closed, and masks of these where a response has several messages.

        Args:
            ids: of `chat.texts`.
        """
        offsets: list[list[Span]] = []
        if chat.ids:
            ids = chat.ids
        elif chat.marked:
            found = [self.texts.encode_marked(text, with_offsets=bool(chat.spans)) for text in chat.marked]
            ids, offsets = [one.ids for one in found], [one.offsets for one in found[1:]]
            if any(one.stayed for one in found):
                chat.notes.append(Note(STAYED))
        elif chat.spans:
            offsets = [self.texts.encode_with_offsets(text)[1] for text in chat.texts[1:]]
        prompt, *sequences = ids
        prompt = _one_bos(prompt, self.tokenizer.bos_token_id)
        sequences = [_one_bos(sequence, self.tokenizer.bos_token_id) for sequence in sequences]
        closed = [self._close_turn(sequence) for sequence in sequences]
        if not chat.has_turns:
            return prompt, closed, None
        masks = []
        for number, (messages, sequence) in enumerate(zip(chat.wholes, closed, strict=True)):
            if not chat.spans:
                masks.append(
                    assistant_mask(messages, chat.num_prompt, sequence, self._render(chat), self.tokenizer.decode)
                )
                continue
            marks = in_spans(offsets[number], chat.spans[number])[-len(sequences[number]) :]
            ends = [messages[-1]["role"] == "assistant"] * (len(sequence) - len(sequences[number]))
            masks.append([*marks, *ends])
        return prompt, closed, masks

    def _render(self, chat: Chat) -> Callable[..., Ids]:
        """Renders the beginning of a conversation of the row to tokens."""
        bos = self.tokenizer.bos_token_id

        def render(messages: Sequence[Message], add_generation_prompt: bool = False) -> Ids:
            if self.code is not None:
                return self.code.ids(messages, chat.kwargs, add_generation_prompt=add_generation_prompt)
            options = {"add_generation_prompt": add_generation_prompt}
            if not chat.marked:
                text = self.template.render([messages], chat.kwargs, **options)[0].text
                return _one_bos(self.texts.encode([text])[0], bos)
            text = self.template.render([walk(messages, self._mark)], chat.kwargs, **options)[0].text
            return _one_bos(self.texts.encode_marked(text).ids, bos)

        return render

    def _close_turn(self, ids: Ids) -> Ids:
        """`ids`, with an EOS unless the template has ended the turn by a special token of its own (EOS, <|im_end|>).

        White space may follow that token: many templates end in EOS and a newline, which stays, as in TRL.
        """
        eos = self.tokenizer.eos_token_id
        for last in reversed(ids):
            if not self.texts.is_blank(last):
                if self.texts.is_control(last):
                    return ids
                break
        return ids if eos is None else [*ids, eos]


def in_spans(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Which tokens have a character in one of the spans, both given in order."""
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


def _as_chat(row: PreferenceRow, kwargs: dict[str, Any], eos: str | None) -> Chat:
    """Prompt and whole conversations; where the prompt ends in the assistant's turn, that turn goes on."""
    prompt: list[Message] = list(row.prompt)  # type: ignore[arg-type]
    responses = [_without_final_eos(response, eos) for response in row.responses]
    is_begun = prompt[-1]["role"] == "assistant" and not prompt[-1].get("tool_calls")
    is_begun = is_begun and all(response[0]["role"] == "assistant" for response in responses)
    if is_begun and not any(prompt[-1].get(key) for key in ("content", *THOUGHT_KEYS)):
        prompt, is_begun = prompt[:-1], False  # a turn of which nothing is said is that of the generation prompt
        if not prompt:
            raise BadRow("empty prompt")
    if not is_begun:
        wholes = [[*prompt, *response] for response in responses]
        return Chat(prompt, wholes, len(prompt), False, kwargs, has_several_turns(row))
    prompt[-1] = {**prompt[-1], "content": prompt[-1].get("content") or ""}
    wholes = [[*prompt[:-1], _joined(prompt[-1], first), *rest] for first, *rest in responses]
    return Chat(prompt, wholes, len(prompt) - 1, True, kwargs, has_several_turns(row))


def _joined(begun: Message, rest: Message) -> Message:
    """One turn of the assistant of its beginning and its end."""
    joined = {**begun, **rest}
    for key in ("content", *THOUGHT_KEYS):
        if isinstance(begun.get(key), str) and isinstance(rest.get(key), str):
            joined[key] = begun[key] + rest[key]
    return joined


def _without_final_eos(messages: Any, eos: str | None) -> list[Message]:
    """The messages, without an EOS that the last one spells out: the template, or `_close_turn`, adds it. One that
    closes an `<s>` of the text is text."""
    last = messages[-1]
    content = last.get("content")
    if not eos or not isinstance(content, str) or not content.endswith(eos) or ends_in_markup(content, eos):
        return list(messages)
    return [*messages[:-1], {**last, "content": content.removesuffix(eos)}]


def _one_bos(ids: Ids, bos: int | None) -> Ids:
    while bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]
    return ids


def _fields(chat: Chat) -> dict[str, Any]:
    """What of a chat is known before it is rendered."""
    names = ("prompt", "wholes", "num_prompt", "goes_on", "kwargs", "has_turns")
    return {name: getattr(chat, name) for name in names}
