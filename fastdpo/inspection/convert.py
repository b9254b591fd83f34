"""Converts preferences in any form to explicit conversational pairs: `convert_data`.

In: preferences in any form. Out: a JSON Lines file with one pair per line: `prompt`, `chosen` and `rejected` as lists
of messages, and `tools` and `chat_template_kwargs` if the row has them. A row with several preferences becomes one pair
per preference. Transcripts (Human: and Assistant:) and Alpaca's headings become turns, and a system prompt becomes a
system message. Any other text becomes one user message and one assistant message, without the blanks between them.
Refused with ValueError: rows of token ids (their text is unknown), data without a usable pair, and rows that the forms
refuse.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastdpo.data.forms import ASSISTANT_TURN, HUMAN_TURN
from fastdpo.data.forms.adapters.building import transcript_messages
from fastdpo.data.forms.columns import Cells, structured
from fastdpo.data.forms.context import system_text
from fastdpo.data.forms.mapping import renamed
from fastdpo.data.tokens.settings import TokenizationSettings
from fastdpo.data.tokens.truncation import EQUAL, different_pairs
from fastdpo.data.values import BadRow
from fastdpo.inspection.inspect import Progress, no_progress
from fastdpo.inspection.output import check_output, json_lines
from fastdpo.inspection.source import TOKENIZED, ReadRow, Source
from fastdpo.types import Message

_HEADING = re.compile(r"(?:^|\n\n)### (Instruction|Input|Response):[ \n]*")


@dataclass(frozen=True)
class Converted:
    """The written file, and the numbers of rows."""

    out: Path
    num_rows: int
    num_pairs: int
    forms: dict[str, int]  # form -> number of rows
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> rows


def convert_data(
    data: Any,
    out: str | os.PathLike[str],
    *,
    settings: TokenizationSettings | None = None,
    split: str = "train",
    config_name: str | None = None,
    progress: Progress = no_progress,
) -> Converted:
    """Writes the pairs of `data` to `out`. Unusable rows are left out and counted.

    Args:
        settings: only dataset_format and columns matter.
        others: as for `inspect_data`.
    Raises:
        ValueError: see the module's docstring.
    """
    target = check_output(out, data)
    source = Source(data, settings or TokenizationSettings(), split=split, config_name=config_name)
    num_rows = num_pairs = 0
    forms: dict[str, int] = {}
    dropped: dict[str, int] = {}
    with json_lines(target) as (write,):
        for read in progress(source.rows(), "converting"):
            num_rows += 1
            try:
                pairs = list(explicit_pairs(read, source.settings.columns))
            except BadRow as error:
                dropped[error.reason] = dropped.get(error.reason, 0) + 1
                continue
            forms[read.form] = forms.get(read.form, 0) + 1
            for pair in pairs:
                write(pair)
                num_pairs += 1
        if num_pairs == 0:
            reasons = ", ".join(f"{reason} ({count})" for reason, count in dropped.items())
            raise ValueError(f"data must hold at least one usable row, got {num_rows} in {source.name}: {reasons}")
    return Converted(target, num_rows, num_pairs, forms, dropped)


def explicit_pairs(read: ReadRow, columns: Mapping[str, Any] | None = None) -> Iterator[dict[str, Any]]:
    """The pairs of one row.

    Args:
        columns: as in the setting `columns`.
    Raises:
        BadRow: the row is unusable.
        ValueError: the row holds token ids.
    """
    row = read.row
    if read.form == TOKENIZED:
        raise ValueError(f"data must hold text or messages to be converted, got token ids in row {read.number}")
    if row is None:
        raise BadRow(read.reason)
    prompt, responses = row.prompt, row.responses
    if isinstance(prompt, str):
        system = system_text(Cells(structured(renamed(read.example, columns))[0]))
        prompt, answers = _conversations(prompt, system, [str(response) for response in responses])
    else:
        answers = [list(response) for response in responses if not isinstance(response, str)]
    more = _for_template(read.kwargs)
    for better, worse in different_pairs(row.preferences, answers, f"{EQUAL} but for blanks"):
        yield {"prompt": prompt, "chosen": answers[better], "rejected": answers[worse], **more}


def _conversations(prompt: str, system: str, responses: list[str]) -> tuple[list[Message], list[list[Message]]]:
    """A text and its responses as messages.

    Args:
        system: the system prompt at the beginning of the text, or "".
    """
    text = prompt.removeprefix(system).lstrip() if system else prompt
    before: list[Message] = [{"role": "system", "content": system}] if system and text != prompt else []
    if text.lstrip().startswith(HUMAN_TURN.lstrip()) and text.rstrip().endswith(ASSISTANT_TURN.lstrip()):
        answers = [transcript_messages(f"{ASSISTANT_TURN} {response}") for response in responses]
        return before + transcript_messages(text), answers
    said = text.strip()
    turns = _task_turns(text) or ([{"role": "user", "content": said}] if said else [])
    return before + turns, [[{"role": "assistant", "content": response.strip()}] for response in responses]


def _task_turns(text: str) -> list[Message]:
    """The turns of a text with Alpaca's headings that ends in "### Response:"; an empty list for any other text."""
    before, *pieces = _HEADING.split(text)
    turns: list[Message] = [{"role": "system", "content": before.strip()}] if before.strip() else []
    kinds, texts = pieces[::2], [piece.strip() for piece in pieces[1::2]]
    if kinds[:1] != ["Instruction"] or kinds[-1] != "Response" or texts[-1]:
        return []
    for kind, said in zip(kinds[:-1], texts[:-1], strict=True):
        if kind == "Input":
            turns[-1] = {**turns[-1], "content": f"{turns[-1]['content']}\n\n{said}"}
        else:
            turns.append({"role": "user" if kind == "Instruction" else "assistant", "content": said})
    return turns


def _for_template(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that give the chat template the same variables."""
    rest = {name: value for name, value in kwargs.items() if name != "tools"}
    tools = {"tools": kwargs["tools"]} if kwargs.get("tools") else {}
    return {**tools, **({"chat_template_kwargs": rest} if rest else {})}
