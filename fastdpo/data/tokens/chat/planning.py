"""From rows of messages to the texts to tokenize, and notes on content that the template leaves out.

In: rows of messages with the arguments of the chat template. Out: one `Chat` per row: the prompt with the generation
prompt and each whole conversation, rendered once, and notes. Rows with equal arguments are rendered together. The
template decides about the BOS.
Refused with BadRow: no prompt, messages that the template refuses. Refused with ValueError: no chat template.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastdpo.data.tokens.chat.conversations import Chat, as_chat
from fastdpo.data.tokens.chat.ledger import Ledger, Stock, shown
from fastdpo.data.tokens.chat.rendering import NO_TEMPLATE, ChatCode, ChatTemplate, renders_by_code
from fastdpo.data.tokens.chat.strings import walk, walk_tools
from fastdpo.data.tokens.chat.templates import FIRST_TRAINED
from fastdpo.data.tokens.control import without_marks
from fastdpo.data.tokens.encoding import TextEncoder, common_start
from fastdpo.data.tokens.notes import FIELD, LOST, OPENS, Note
from fastdpo.data.values import BadRow
from fastdpo.types import Message, PreferenceRow

Job = tuple[PreferenceRow, dict[str, Any], tuple[str, ...]]  # row, arguments of the template, names of the responses
Planned = Chat | ValueError


class ChatPlanner:
    """Renders rows of messages with one tokenizer, and caches facts about the template."""

    def __init__(self, texts: TextEncoder, chat_template: str | None = None) -> None:
        self.texts = texts
        self.tokenizer = texts.tokenizer
        self.control = texts.control
        by_code = chat_template is None and renders_by_code(self.tokenizer)
        self.code = ChatCode(self.tokenizer) if by_code else None
        self.template = ChatTemplate(self.tokenizer, chat_template)
        self.ledger = Ledger()
        self._eos = self.tokenizer.eos_token
        self._takes_spans = getattr(self.tokenizer, "backend_tokenizer", None) is not None  # which has offsets

    def plan(self, jobs: Sequence[Job]) -> list[Planned]:
        """Each row rendered, or the error that prevents it."""
        planned: list[Planned] = []
        stocks: list[Stock | None] = []
        for row, kwargs, sides in jobs:
            try:
                if self.code is None and not self.template.is_there(kwargs):
                    raise ValueError(NO_TEMPLATE)
                chat = as_chat(row, kwargs, sides, self._eos)
                planned.append(chat)
                stocks.append(Stock(chat.wholes, chat.num_prompt, kwargs.get("tools")))
            except ValueError as error:
                planned.append(error)
                stocks.append(None)
        if self.code is None:
            self._render_all(planned, stocks)
        for number, (plan, stock) in enumerate(zip(planned, stocks, strict=True)):
            if isinstance(plan, Chat) and stock is not None:
                try:
                    self._note(plan, stock) if self.code is None else self._render_by_code(plan, stock)
                except ValueError as error:
                    planned[number] = error
        return planned

    # By a template

    def _render_all(self, planned: list[Planned], stocks: Sequence[Stock | None]) -> None:
        """Renders all chats, those with equal arguments together; a chat that fails is replaced by its error."""
        together: list[list[int]] = []
        for number, (chat, stock) in enumerate(zip(planned, stocks, strict=True)):
            if not isinstance(chat, Chat) or stock is None:
                continue
            if FIRST_TRAINED in self.template.jinja(chat.kwargs):
                chat.kwargs = {**chat.kwargs, FIRST_TRAINED: chat.num_prompt}
            if self.control.are_in_any(stock.strings()):
                self._mark_messages(chat)
            is_alone = chat.goes_on or chat.has_turns or chat.is_marked
            first = planned[together[-1][0]] if together and together[-1] else None
            if not is_alone and isinstance(first, Chat) and first.kwargs == chat.kwargs:
                together[-1].append(number)
            else:
                together.append([number])
                if is_alone:
                    together.append([])  # nothing joins it
        for numbers in together:
            chats = [chat for chat in (planned[number] for number in numbers) if isinstance(chat, Chat)]
            try:
                self._render_together(chats)
            except BadRow:  # of one or more of them
                for number, chat in zip(numbers, chats, strict=True):
                    try:
                        self._render_one(chat)
                    except BadRow as error:
                        planned[number] = error

    def _render_together(self, chats: Sequence[Chat]) -> None:
        if len(chats) < 2:
            for chat in chats:
                self._render_one(chat)
            return
        kwargs = chats[0].kwargs
        prompts = self.template.render([chat.prompt for chat in chats], kwargs, add_generation_prompt=True)
        wholes = iter(self.template.render([whole for chat in chats for whole in chat.wholes], kwargs))
        for chat, prompt in zip(chats, prompts, strict=True):
            chat.texts = [prompt.text, *(next(wholes).text for _ in chat.wholes)]

    def _render_one(self, chat: Chat) -> None:
        with_spans = chat.has_turns and self._takes_spans and self.template.marks_assistant(chat.kwargs)
        prompt = self._prompt_text(chat)
        rendered = self.template.render(chat.wholes, chat.kwargs, with_spans=with_spans)
        chat.texts = [prompt, *(whole.text for whole in rendered)]
        chat.spans = [whole.spans for whole in rendered] if with_spans else []

    def _prompt_text(self, chat: Chat) -> str:
        if not chat.goes_on:
            return self.template.render([chat.prompt], chat.kwargs, add_generation_prompt=True)[0].text
        try:
            return self.template.render([chat.prompt], chat.kwargs, continue_final_message=True)[0].text
        except BadRow:
            self.template.render([chat.prompt], chat.kwargs)  # refused altogether, which has a reason of its own
            raise BadRow("the chat template leaves out the assistant turn at the end of the prompt") from None

    def _mark_messages(self, chat: Chat) -> None:
        """Puts marks around the special tokens that conversations and tools spell out."""
        kwargs = {key: walk_tools(value, self._mark) if key == "tools" else value for key, value in chat.kwargs.items()}
        chat.kwargs, chat.is_marked = kwargs, True
        chat.prompt = walk(chat.prompt, self._mark)
        chat.wholes = [walk(messages, self._mark) for messages in chat.wholes]

    def _mark(self, kind: str, text: str) -> str:
        return self.control.mark(text, is_assistant=kind in ("answers", "thoughts", "calls"))

    # By code

    def _render_by_code(self, chat: Chat, stock: Stock) -> None:
        assert self.code is not None
        is_asked = chat.prompt[-1]["role"] != "assistant"
        how = {"continue_final_message": chat.goes_on, "add_generation_prompt": is_asked}
        prompt = self.code.ids(chat.prompt, chat.kwargs, **how)
        chat.ids = [prompt, *(self.code.ids(whole, chat.kwargs) for whole in chat.wholes)]
        chat.texts = [self.texts.decode(ids) for ids in chat.ids]
        self._note(chat, stock)

    # What is lost

    def _note(self, chat: Chat, stock: Stock) -> None:
        """Notes the content that the template left out of the prompt and of each response, and a different end of the
        prompt when rendered alone."""
        prompt, *wholes = map(without_marks, chat.texts) if chat.is_marked else chat.texts
        goes_on = all(text.startswith(prompt) for text in wholes)
        render, key = self._render_words(chat.kwargs)
        notes: dict[tuple[str, str, str], Note] = {}
        for number, (side, text) in enumerate(zip(chat.sides, wholes, strict=True)):
            start = 0 if chat.goes_on else len(prompt) if goes_on else len(common_start([prompt, text]))
            before, after, fields = self.ledger.losses(stock, number, text, start, render, key)
            for name, losses in (("prompts", before), (side, after)):
                for loss in losses:
                    notes.setdefault((LOST, loss.kind, name), Note(LOST, loss.kind, name, loss.example))
            for name in fields:
                notes.setdefault((FIELD, name, ""), Note(FIELD, name))
        chat.notes += notes.values()
        if not goes_on:
            chat.notes.append(Note(OPENS, shown(prompt[len(common_start([prompt, *wholes])) :])))

    def _render_words(self, kwargs: dict[str, Any]) -> tuple[Callable[[Sequence[Message], Any], str], str]:
        """A function that renders other messages and tools with these arguments, and a key of the arguments."""
        others = {key: value for key, value in kwargs.items() if key != "tools"}

        def render(messages: Sequence[Message], tools: Any) -> str:
            arguments = {**others, "tools": tools} if tools else others
            return self.text_of(messages, arguments)

        return render, repr(sorted(others.items())) if others else ""

    def text_of(self, messages: Sequence[Message], kwargs: Mapping[str, Any]) -> str:
        """A whole conversation as text."""
        if self.code is None:
            return self.template.render([messages], kwargs)[0].text
        return self.texts.decode(self.code.ids(messages, kwargs))
