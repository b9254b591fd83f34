"""The general forms of preference and fine-tuning rows, as TRL and other trainers define them. Readers for datasets
with their own columns are in `fastdpo.data.forms.adapters`.

In: rows with the columns that FORMS and SFT_FORMS list, or with other names of the same kinds (`columns`). Out: a
`PreferenceRow`. Four modules read cells (`roles`, `messages`, `json_text`, `text`), two assemble a row (`context`,
`answers`), and each kind of form has one module (`pairs`, `winners`, `rankings`, `sft`).
"""

from fastdpo.data.forms.columns import Cells
from fastdpo.data.forms.messages import as_messages, is_empty
from fastdpo.data.forms.pairs import (
    conversation_and_rejected,
    explicit_prompt,
    has_context,
    has_conversation_and_rejected,
    has_pair,
    has_response_and_rejected,
    implicit_prompt,
    response_and_rejected,
)
from fastdpo.data.forms.rankings import has_ranking, ranked, ranked_row
from fastdpo.data.forms.sft import (
    alpaca,
    conversations_sft,
    has_conversations,
    messages_sft,
    plain_text,
    prompt_completion,
)
from fastdpo.data.forms.text import ASSISTANT_TURN, HUMAN_TURN, as_transcript
from fastdpo.data.forms.winners import has_winner, winner
from fastdpo.data.values import RowFormat

__all__ = [
    "ASSISTANT_TURN",
    "EXPLICIT",
    "FORMS",
    "HUMAN_TURN",
    "RANKED",
    "SFT_FORMS",
    "Cells",
    "as_messages",
    "as_transcript",
    "is_empty",
    "ranked_row",
]


def _has_prompt_and_pair(cells: Cells) -> bool:
    return cells.has("prompt", "chosen", "rejected")


def _has_context_and_pair(cells: Cells) -> bool:
    return has_pair(cells) and has_context(cells)


_PAIR = ("prompt", "chosen", "rejected")
EXPLICIT = RowFormat("explicit", _PAIR, explicit_prompt, recognizes=_has_prompt_and_pair)
RANKED = RowFormat("ranked", ("prompt", "responses", "scores"), ranked, may_be_transcript=True, recognizes=has_ranking)
FORMS = (
    RANKED,
    RowFormat("explicit", _PAIR, explicit_prompt, may_be_transcript=True, recognizes=_has_context_and_pair),
    RowFormat("implicit", ("chosen", "rejected"), implicit_prompt, recognizes=has_pair),
    RowFormat(
        "explicit",
        ("prompt", "response", "rejected"),
        response_and_rejected,
        may_be_transcript=True,
        recognizes=has_response_and_rejected,
    ),
    RowFormat(
        "messages_rejected",
        ("messages", "rejected"),
        conversation_and_rejected,
        recognizes=has_conversation_and_rejected,
    ),
    RowFormat(
        "winner",
        ("prompt", "response_a", "response_b", "winner"),
        winner,
        may_be_transcript=True,
        recognizes=has_winner,
    ),
)
SFT_FORMS = (
    RowFormat("prompt_completion", ("prompt", "completion"), prompt_completion),
    RowFormat("messages", ("messages",), messages_sft),
    RowFormat("sharegpt", ("conversations",), conversations_sft, recognizes=has_conversations),
    RowFormat("alpaca", ("instruction", "output"), alpaca, further=("text",)),
    RowFormat("text", ("text",), plain_text),
)
