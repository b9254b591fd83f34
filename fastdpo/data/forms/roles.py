"""Who says a message: one table of the names that chat data has for the four roles of chat templates.

In: a name as it stands in a dataset, whatever its case and the blanks around it. Out: user, assistant, system or tool.
Refused with BadRow, by its name: any other. A name that a template does not know would be rendered as it stands, and
the model would learn it as part of the answer.

The names are those of the trainers' documentation (TRL, Axolotl, LLaMA-Factory, ms-swift, Unsloth, torchtune, OpenAI,
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
        *("function_call", "tool_call", "tool_calls", "function_calls"),  # what the assistant asks a tool
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
    """The role that `name` stands for, or None where the table has no such name."""
    return _role(name) if isinstance(name, str) else None


@lru_cache(maxsize=1024)
def _role(name: str) -> str | None:
    return ROLES.get(re.sub(r"[\s-]+", "_", name.strip()).lower())


def role_of(name: Any) -> str:
    """The role that `name` stands for.

    Raises:
        BadRow: there is no name, or the table does not have it.
    """
    if not isinstance(name, str) or not name.strip():
        raise BadRow("message without role")
    role = known_role(name)
    if role is None:
        raise BadRow(f"unknown role {name!r}")
    return role
