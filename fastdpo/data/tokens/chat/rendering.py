"""From the messages of a row to text, or to tokens if the tokenizer renders messages by its own code.

In: messages and the arguments of the chat template. Out: the rendered text, and the character spans that the template
marks as the assistant's (`{% generation %}`). mistral-common's tokenizers have no template: their code turns messages
into tokens, in the mode that accepts the conversation's last message.
Refused with BadRow: messages that the template or the code refuses. Refused with ValueError: a missing template.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fastdpo.data.tokens.chat.templates import check_template_name
from fastdpo.data.tokens.chat.time_limit import TooLong, time_limit
from fastdpo.data.values import BadRow, as_text
from fastdpo.types import Message

NO_TEMPLATE = (
    "tokenizer must have a chat template for rows of messages, got none: set chat_template or"
    " tokenizer.chat_template, or write the rows as text (prompt, chosen, rejected)"
)
RENDER_SECONDS = 60.0  # for the rows that are rendered together; usual templates take milliseconds
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # names of one thing; templates read one or the other
# what the template's own expressions raise: "text" + a dict, 1 / 0, an endless recursion of macros, 1e999 (a name, inf)
_OF_EXPRESSIONS = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError, NameError)
_MARKED = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")

Span = tuple[int, int]  # characters


@dataclass(frozen=True)
class Rendered:
    """One rendered conversation."""

    text: str
    spans: tuple[Span, ...] = ()  # the assistant's parts, if the template marks them and they were requested


@contextmanager
def rendering_ends(template: object, num_conversations: int = 1) -> Iterator[None]:
    """Around what a chat template renders.

    Raises:
        ValueError: it loops for ever.
    """
    try:
        with time_limit(RENDER_SECONDS):
            yield
    except TooLong:
        raise ValueError(
            f"chat_template must render {num_conversations} conversations in less than {RENDER_SECONDS} s, got one"
            f" that does not end: {str(template)[:80]!r}"
        ) from None


class ChatTemplate:
    """The template of a run, or of the tokenizer, applied to conversations."""

    def __init__(self, tokenizer: Any, template: str | None = None) -> None:
        if template is not None:
            if is_mistral_common(tokenizer):
                raise ValueError(
                    "chat_template must be None for a tokenizer of mistral-common, which renders messages by its own"
                    f" code, got {template[:40]!r}"
                )
            check_template_name(template, tokenizer)
        self.tokenizer = tokenizer
        self._template = template
        self._variables = dict(getattr(tokenizer, "special_tokens_map", {}))

    def is_there(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether the run, the tokenizer or the row has a template."""
        own = getattr(self.tokenizer, "chat_template", None)
        return self._template is not None or own is not None or "chat_template" in kwargs

    def marks_assistant(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether the template itself marks the assistant's parts."""
        return _MARKED.search(self.jinja(kwargs)) is not None

    def render(
        self,
        conversations: Sequence[Sequence[Message]],
        kwargs: Mapping[str, Any],
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        with_spans: bool = False,
    ) -> list[Rendered]:
        """Each conversation as text.

        Raises:
            BadRow: the template refuses one of them.
            ValueError: the template loops for ever.
        """
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        jinja = self.jinja(kwargs)
        further = {key: value for key, value in kwargs.items() if key != "chat_template"}
        with rendering_ends(jinja, len(conversations)):
            try:
                texts, spans = render_jinja_template(
                    conversations=[with_thoughts_by_all_names(messages) for messages in conversations],
                    chat_template=jinja,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    return_assistant_tokens_mask=with_spans,
                    **{**self._variables, **further},
                )
            except (TemplateError, *_OF_EXPRESSIONS) as error:
                raise BadRow(f"the chat template refuses the messages ({error})") from None
        marked = spans if with_spans else [()] * len(texts)
        of_template = "what the chat template renders"
        return [Rendered(as_text(text, of_template), tuple(found)) for text, found in zip(texts, marked, strict=True)]

    def jinja(self, kwargs: Mapping[str, Any]) -> str:
        """The template for a row with these arguments."""
        template = kwargs.get("chat_template") or self._template
        jinja: str = self.tokenizer.get_chat_template(template, tools=kwargs.get("tools"))
        return jinja


class ChatCode:
    """A tokenizer with its own code in `apply_chat_template`: mistral-common's, or one that comes with a model."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._of_mode: dict[str, Any] = {}

    def ids(
        self,
        messages: Sequence[Message],
        kwargs: Mapping[str, Any],
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
    ) -> list[int]:
        """The tokens of a conversation.

        Raises:
            BadRow: the code refuses it.
        """
        options: dict[str, Any] = {}
        if add_generation_prompt:
            options["add_generation_prompt"] = True
        if continue_final_message:
            options["continue_final_message"] = True
        is_whole = messages[-1]["role"] == "assistant" and not continue_final_message
        tokenizer = self._in_mode("finetuning" if is_whole else "test")
        try:
            encoded = tokenizer.apply_chat_template(
                list(messages), tokenize=True, return_dict=True, **options, **kwargs
            )
        except Exception as error:  # any exception of the code's library
            first = str(error).strip().partition("\n")[0]
            raise BadRow(f"the tokenizer refuses the messages ({first})") from None
        return list(encoded["input_ids"])

    def _in_mode(self, mode: str) -> Any:
        """Sets the mode of mistral-common's tokenizer: "test" accepts conversations that wait for an answer,
        "finetuning" those that end in one. Any other tokenizer has one mode."""
        own = getattr(self.tokenizer, "mode", None)
        if not is_mistral_common(self.tokenizer) or str(getattr(own, "value", own)) == mode:
            return self.tokenizer
        if mode not in self._of_mode:
            path = self.tokenizer.tokenizer.instruct_tokenizer.tokenizer.file_path
            self._of_mode[mode] = type(self.tokenizer)(path, mode=mode)
        return self._of_mode[mode]


def renders_by_code(tokenizer: Any) -> bool:
    """Whether a tokenizer turns messages into tokens by its own code instead of a template."""
    from transformers import PreTrainedTokenizerBase

    method = getattr(type(tokenizer), "apply_chat_template", None)
    return method is not None and method is not PreTrainedTokenizerBase.apply_chat_template


def has_chat_template(tokenizer: Any) -> bool:
    return renders_by_code(tokenizer) or getattr(tokenizer, "chat_template", None) is not None


def is_mistral_common(tokenizer: Any) -> bool:
    return any(kind.__name__ == "MistralCommonBackend" for kind in type(tokenizer).__mro__)


def with_thoughts_by_all_names(messages: Sequence[Message]) -> list[Message]:
    """Messages with thoughts under every name that templates read (transformers since 5.20), without None."""
    return [_with_aliases(message) for message in messages]


def _with_aliases(message: Message) -> Message:
    if len(message) == 2 and None not in message.values():
        return message  # role and content
    thought = next((message[name] for name in _THOUGHTS if message.get(name) is not None), None)
    kept = {key: value for key, value in message.items() if value is not None}
    return kept if thought is None else {"thinking": thought, **kept, "reasoning_content": thought}
