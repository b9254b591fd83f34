"""Role names: one table from the names in chat data to the four roles of chat templates.

In: a role name from a dataset; case and surrounding white space do not matter. Out: user, assistant, system or tool.
Refused with BadRow: any other name. A template would render an unknown name unchanged, and the model would learn it as
part of the answer.

The names come from the trainers' documentation (TRL, Axolotl, LLaMA-Factory, ms-swift, Unsloth, torchtune, OpenAI,
Anthropic, Gemini, Llama) and of published datasets (ShareGPT, OpenAssistant, Hermes, Glaive).
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from fastdpo.data.values import BadRow

ROLE_NAMES = {
    "user": (
        *("user", "human", "prompter", "usr", "client", "customer", "questioner", "asker", "person"),
        *("prompt", "instruction", "question", "query", "input", "user_message", "user_prompt"),
    ),
    "assistant": (
        *("assistant", "gpt", "model", "bot", "ai", "chatbot", "agent", "llm", "assistant_message", "answerer"),
        *("chatgpt", "bing", "bard", "claude", "gemini"),  # ShareGPT's pages name the product
        *("response", "answer", "output", "completion", "reply"),
        *("function_call", "tool_call", "tool_calls", "function_calls"),  # calls of tools by the assistant
    ),
    "system": ("system", "sys", "developer", "system_prompt", "system_message"),
    "tool": (
        *("tool", "tools", "function", "observation", "ipython", "environment", "api"),
        *("tool_response", "tool_result", "tool_results", "tool_output", "tool_message"),
        *("function_response", "function_result", "function_results", "function_output"),
    ),
}
ROLES = {name: role for role, names in ROLE_NAMES.items() for name in names}


def known_role(name: Any) -> str | None:
    """The role that `name` stands for, or None for an unknown name."""
    return _role(name) if isinstance(name, str) else None


@lru_cache(maxsize=1024)
def _role(name: str) -> str | None:
    return ROLES.get(re.sub(r"[\s-]+", "_", name.strip()).lower())


def role_of(name: Any) -> str:
    """The role that `name` stands for.

    Raises:
        BadRow: the name is missing or unknown.
    """
    if not isinstance(name, str) or not name.strip():
        raise BadRow("message without role")
    role = known_role(name)
    if role is None:
        raise BadRow(f"unknown role {name!r}")
    return role
