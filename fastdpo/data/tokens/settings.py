"""Settings of tokenization: lengths, chat template, and the treatment of long, bad and lossy rows.

Refused with ValueError: an invalid setting, by name, rule and value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastdpo.data.forms.formats import AUTO, check_columns, check_format_name
from fastdpo.data.tokens.chat.templates import RESERVED_KWARGS

TRUNCATION_MODES = ("keep_start", "keep_end")
BAD_ROW_POLICIES = ("drop", "raise")
LONG_ROW_POLICIES = ("truncate", "drop", "raise")
LOST_CONTENT_POLICIES = ("warn", "drop", "raise")


@dataclass(frozen=True)
class TokenizationSettings:
    """Settings for turning rows into tokens, and for rows that cannot be tokenized as given."""

    max_length: int | None = 1024  # tokens of prompt and one response; None leaves them whole
    max_prompt_length: int | None = None  # tokens of the prompt, cut before max_length is looked at
    truncation_mode: str = "keep_start"  # which end survives: "keep_start" or "keep_end"
    on_bad_row: str = "drop"  # "drop" counts and reports it, "raise" stops at the first
    on_long_row: str = "truncate"  # "truncate" to the lengths above, "drop" counts and reports it, "raise" stops
    on_lost_content: str = "warn"  # content lost by the template: "warn" reports it, "drop" drops the row too, "raise"
    chat_template: str | None = None  # Jinja, or the name of one of the tokenizer's; None takes the tokenizer's
    chat_template_kwargs: dict[str, Any] | None = None  # variables for it, where a row does not set them
    dataset_format: str = AUTO  # a name of `formats.FORMAT_NAMES`; "auto" goes by the columns
    columns: Mapping[str, Any] | None = None  # our names -> the dataset's columns, see `forms.mapping`
    rankings: bool = False  # preferences become the neighbouring pairs of a ranking, see `loss_rows`
    shared_parts: bool = False  # each pair also holds both responses up to their shared length

    def __post_init__(self) -> None:
        check_format_name(self.dataset_format)
        object.__setattr__(self, "columns", check_columns(self.columns))
        for name, least in (("max_length", 2), ("max_prompt_length", 1)):  # one token alone has nothing to predict it
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < least):
                raise ValueError(f"{name} must be an integer >= {least} or None, got {value!r}")
        for name, choices in (
            ("truncation_mode", TRUNCATION_MODES),
            ("on_bad_row", BAD_ROW_POLICIES),
            ("on_long_row", LONG_ROW_POLICIES),
            ("on_lost_content", LOST_CONTENT_POLICIES),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        reserved = [name for name in RESERVED_KWARGS if name in (self.chat_template_kwargs or {})]
        if reserved:
            raise ValueError(f"chat_template_kwargs must not hold {reserved}: fastdpo sets these for each text")
