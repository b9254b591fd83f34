"""A conversation with a model: messages in, its answer out, as text that can be shown while it is written.

A tokenizer without a chat template gets the conversation as a transcript of Human: and Assistant:, which is what it was
trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastdpo.data.forms import ASSISTANT_TURN, HUMAN_TURN
from fastdpo.data.tokens.chat.rendering import has_chat_template, rendering_ends
from fastdpo.modeling.generation import generate_ids, special_ids
from fastdpo.types import Message


class Talker:
    """A model that answers.

    Args:
        temperature: >= 0; 0 takes the likeliest token.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, max_new_tokens: int = 512, temperature: float = 0.7, seed: int = 0
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.max_new_tokens, self.temperature, self.seed = max_new_tokens, temperature, seed

    def reply(self, messages: Sequence[Message], say: Callable[[str], None] | None = None) -> str:
        """The answer to a conversation that ends with the user.

        Args:
            say: gets pieces of the text as they are written.
        """
        pad_id, eos_ids = special_ids(self.model, self.tokenizer)
        self.seed += 1  # the same question again gets another answer
        (ids,) = generate_ids(
            self.model,
            [self.prompt_ids(messages)],
            pad_id=pad_id,
            eos_ids=eos_ids,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            seed=self.seed,
            streamer=None if say is None else _streamer(self.tokenizer, say),
        )
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        if not has_chat_template(self.tokenizer):  # it may go on to write the user's next turn
            text = text.split(HUMAN_TURN)[0]
        return text.strip()

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The conversation as the tokens that the answer goes on from.

        Raises:
            ValueError: the chat template refuses the conversation.
        """
        if has_chat_template(self.tokenizer):
            return templated_ids(self.tokenizer, messages)
        names = {"user": f"{HUMAN_TURN} ", "assistant": f"{ASSISTANT_TURN} "}
        text = "".join(names.get(message["role"], "") + message["content"] for message in messages)
        return list(self.tokenizer(text + ASSISTANT_TURN)["input_ids"])


def templated_ids(
    tokenizer: Any, messages: Sequence[Message], template_kwargs: Mapping[str, Any] | None = None
) -> list[int]:
    """The tokens of a conversation, after which the model answers.

    Raises:
        ValueError: the chat template refuses the conversation, or loops for ever.
    """
    from jinja2 import TemplateError

    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": False, **(template_kwargs or {})}
    try:
        with rendering_ends(getattr(tokenizer, "chat_template", None)):
            return list(tokenizer.apply_chat_template(list(messages), **options))
    except TemplateError as error:
        said = "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
        raise ValueError(f"messages must fit the chat template, got {said[:80]!r}: {error}") from error


def _streamer(tokenizer: Any, say: Callable[[str], None]) -> Any:
    from transformers import TextStreamer

    class Saying(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text:
                say(text)

    return Saying(tokenizer, skip_prompt=True, skip_special_tokens=True)
