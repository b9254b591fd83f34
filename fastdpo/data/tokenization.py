"""From a `PreferenceRow` to a `TokenizedGroup`.

Two steps, both pure: `encode_rows` (chat template, one BOS, one EOS, prompt tokens that are a prefix of every sequence)
and `truncate` (`max_prompt_length`, then `max_length`); `tokenize_row` is the two together for one row. A row that
cannot be used raises BadRow; messages for a tokenizer without a chat template are a ValueError.

Rows are encoded many at a time: rendered one by one (`conversations`), then tokenized together (`encoding`).

The same tokens as TRL 1.16's DPOTrainer, and what it does not do: a BOS or EOS is never doubled, an EOS is added to a
conversation whose template leaves the turn open, only the assistant's tokens of a response of several turns count
(`turns`), special tokens that a message spells out are text (`control`), a prompt that ends in the assistant's turn
goes on with it, and rows without a usable difference are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastdpo.data.chat.conversations import Chat
from fastdpo.data.chat.planning import ChatPlanner
from fastdpo.data.chat.rendering import has_chat_template
from fastdpo.data.chat.sequences import ChatSequences
from fastdpo.data.chat.templates import RESERVED_KWARGS
from fastdpo.data.encoding import Ids, TextEncoder
from fastdpo.data.formats import AUTO, check_format_name
from fastdpo.data.forms import is_empty
from fastdpo.data.notes import LOST, PLAIN_TEXT, SPELLED, UNKNOWN, Note
from fastdpo.data.turns import has_several_turns, transcript_mask
from fastdpo.data.values import BadRow, common_prefix_length
from fastdpo.types import PreferenceRow, TokenizedGroup

TRUNCATION_MODES = ("keep_start", "keep_end")
BAD_ROW_POLICIES = ("drop", "raise")
LONG_ROW_POLICIES = ("truncate", "drop", "raise")
LOST_CONTENT_POLICIES = ("warn", "drop", "raise")
_EQUAL = "chosen equals rejected"
_DECODED_ROWS = 8  # compared with their text, token by token


@dataclass(frozen=True)
class TokenizationSettings:
    """How rows become tokens, and what happens to rows that cannot."""

    max_length: int | None = 1024  # tokens of prompt and one response; None leaves them whole
    max_prompt_length: int | None = None  # tokens of the prompt, cut before max_length is looked at
    truncation_mode: str = "keep_start"  # which end survives: "keep_start" or "keep_end"
    on_bad_row: str = "drop"  # "drop" counts and reports it, "raise" stops at the first
    on_long_row: str = "truncate"  # "truncate" to the lengths above, "drop" counts and reports it, "raise" stops
    on_lost_content: str = "warn"  # of what the template leaves out: "warn" reports it, "drop" the row too, "raise"
    chat_template: str | None = None  # Jinja, or the name of one of the tokenizer's; None takes the tokenizer's
    chat_template_kwargs: dict[str, Any] | None = None  # variables for it, where a row does not set them
    dataset_format: str = AUTO  # a name of `formats.FORMAT_NAMES`; "auto" goes by the columns
    rankings: bool = False  # preferences become the neighbouring pairs of a ranking, see `loss_rows`
    shared_parts: bool = False  # each pair also brings both responses up to the length that they share

    def __post_init__(self) -> None:
        check_format_name(self.dataset_format)
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
            raise ValueError(f"chat_template_kwargs must not hold {reserved}, which are set for every text apart")


@dataclass(frozen=True)
class EncodedRow:
    """What became of a row: its tokens, or why there are none; and what is to be said of it."""

    group: TokenizedGroup | None = None
    error: ValueError | None = None  # BadRow, or what concerns more than the row
    is_merged: bool = False  # the end of the prompt alone is tokenized differently than with a response
    notes: list[Note] = field(default_factory=list)


class LeftOut(BadRow):
    """A row that could be used and is left out because the settings say so, whatever `on_bad_row` says."""


def tokenize_row(
    row: PreferenceRow,
    tokenizer: Any,
    settings: TokenizationSettings,
    template_kwargs: dict[str, Any] | None = None,
) -> TokenizedGroup:
    """The row as tokens, cut to length.

    Args:
        tokenizer: a transformers tokenizer; with a chat template if the row is conversational.
        template_kwargs: further arguments for the chat template, such as `tools`.
    Raises:
        BadRow: the row cannot be used; `.reason` says why.
        ValueError: the row is conversational and the tokenizer has no chat template.
    """
    encoder = RowEncoder(tokenizer, settings.chat_template, settings.chat_template_kwargs)
    return truncate(_group_of(encoder.encode([(row, template_kwargs or {})])[0]), settings)


def padding_id(tokenizer: Any) -> int:
    """What rows are padded with: the tokenizer's padding token, or its EOS where it has none."""
    pad_id: int = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return pad_id


def encode_row(
    row: PreferenceRow, tokenizer: Any, template_kwargs: dict[str, Any] | None = None
) -> tuple[TokenizedGroup, bool]:
    """The whole row as tokens, and whether the end of the prompt alone is tokenized differently than with a response.

    Where it is, the differing tokens belong to the response: with "ab" one token, prompt "a" and response "b" give an
    empty prompt and the response ("ab",). The same holds for templates that render the prompt alone in another way.
    """
    encoded = RowEncoder(tokenizer).encode([(row, template_kwargs or {})])[0]
    return _group_of(encoded), encoded.is_merged


def _group_of(encoded: EncodedRow) -> TokenizedGroup:
    if encoded.error is not None:
        raise encoded.error
    assert encoded.group is not None
    return encoded.group


class RowEncoder:
    """Rows to tokens with one tokenizer and one chat template; what it finds out about them is kept."""

    def __init__(
        self, tokenizer: Any, chat_template: str | None = None, template_kwargs: dict[str, Any] | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.texts = TextEncoder(tokenizer)
        self.chats = ChatPlanner(self.texts, chat_template)
        self.sequences = ChatSequences(self.texts, self.chats)
        self.template_kwargs = dict(template_kwargs or {})
        self._has_template = has_chat_template(tokenizer) or chat_template is not None
        self._unknown = _unknown_id(tokenizer)
        self._num_to_decode = _DECODED_ROWS

    def takes_messages(self, template_kwargs: dict[str, Any]) -> bool:
        """Whether messages of a row with these arguments can be rendered."""
        return self._has_template or "chat_template" in {**self.template_kwargs, **template_kwargs}

    def encode(self, rows: Sequence[tuple[PreferenceRow, dict[str, Any]]]) -> list[EncodedRow]:
        """The rows as tokens.

        Args:
            rows: each with further arguments for the chat template, which win over the run's.
        """
        plans: list[_TextPlan | Chat | ValueError | None] = [self._plan_text(row) for row, _ in rows]
        of_messages = [number for number, plan in enumerate(plans) if plan is None]
        jobs = [
            (rows[number][0], {**self.template_kwargs, **rows[number][1]}, side_names(rows[number][0]))
            for number in of_messages
        ]
        for number, chat in zip(of_messages, self.chats.plan(jobs), strict=True):
            plans[number] = chat
        ids = iter(self.texts.encode_rows([_to_tokenize(plan) for plan in plans]))
        return [self._finished(row, plan, next(ids)) for (row, _), plan in zip(rows, plans, strict=True)]

    def _finished(self, row: PreferenceRow, plan: _TextPlan | Chat | ValueError | None, ids: list[Ids]) -> EncodedRow:
        """The row with its tokens."""
        if plan is None or isinstance(plan, ValueError):
            return EncodedRow(error=plan)
        notes = plan.notes
        try:
            if isinstance(plan, Chat):
                prompt, sequences, masks = self.sequences.of(plan, ids)
            else:
                prompt, sequences, masks = self._text_tokens(row, plan, ids)
            notes += self._unknown_characters(row, plan, sequences)
            num_prompt = min(_num_shared(prompt, sequence) for sequence in sequences)
            responses = [sequence[num_prompt:] for sequence in sequences]
            if any(len(response) == 0 for response in responses):  # a template that leaves the response out
                raise BadRow("empty response")
            if masks is not None:
                masks = [mask[num_prompt:] for mask in masks]
            lost = {note.what: None for note in notes if note.kind == LOST and note.side != "prompts"}
            equal = f"{_EQUAL} but for {' and '.join(lost)}, which the chat template leaves out" if lost else _EQUAL
            preferences = _different(row.preferences, row.responses, _EQUAL)
            group = _checked(prompt[:num_prompt], responses, masks, preferences, equal)
        except ValueError as error:
            return EncodedRow(error=error, notes=notes)
        return EncodedRow(group, None, num_prompt < len(prompt), notes)

    # Text

    def _plan_text(self, row: PreferenceRow) -> _TextPlan | ValueError | None:
        """Prompt and whole texts, as they are: special tokens that they spell out are what they say, but for markup
        inside a line (`control`). An error where the row cannot be used, None where it holds messages."""
        try:
            for response in row.responses:
                if is_empty(response):
                    raise BadRow("empty response")
            _different(row.preferences, row.responses, _EQUAL)
        except BadRow as error:
            return error
        if row.is_conversational:
            return None
        control = self.texts.control
        texts = [str(row.prompt), *(f"{row.prompt}{response}" for response in row.responses)]
        notes = [Note(PLAIN_TEXT)] if self._has_template else []
        is_marked = False
        if any(map(control.are_in, texts)):
            marked = [control.mark_markup(text) for text in texts]
            is_marked = marked != texts
            texts = marked
            inside = [self._without_ends(text) for text in texts[1:]]
            names = dict.fromkeys(name for text in inside for name in control.found_outside_marks(text))
            notes += [Note(SPELLED, name) for name in names]
        return _TextPlan(texts, is_marked, notes)

    def _without_ends(self, text: str) -> str:
        """A text without the BOS and EOS that stand at its ends, where they belong."""
        for token in (self.tokenizer.bos_token, self.tokenizer.eos_token):
            text = text.removeprefix(token or "").removesuffix(token or "")
        return text

    def _text_tokens(
        self, row: PreferenceRow, plan: _TextPlan, ids: list[Ids]
    ) -> tuple[Ids, list[Ids], list[list[bool]] | None]:
        """Prompt and whole sequences, each with the tokens that the tokenizer puts first; sequences end in one EOS.

        Masks of the sequences where the user speaks in a response, as in HH transcripts that part early.
        """
        if plan.is_marked:
            ids = [self.texts.encode_marked(text).ids for text in plan.texts]
        first = self.texts.leading_ids()
        prompt, *sequences = (_begin_once(first, text_ids, self.tokenizer) for text_ids in ids)
        sequences = [_end_once(sequence, self.tokenizer) for sequence in sequences]
        if not has_several_turns(row):
            return prompt, sequences, None

        def encode(text: str) -> Ids:
            return _begin_once(first, self.texts.encode([text])[0], self.tokenizer)

        pairs = zip(row.responses, sequences, strict=True)
        return prompt, sequences, [transcript_mask(str(row.prompt), str(text), ids, encode) for text, ids in pairs]

    def _unknown_characters(self, row: PreferenceRow, plan: _TextPlan | Chat, sequences: list[Ids]) -> list[Note]:
        """Of sides with characters that the tokenizer has no token for; of the first rows, of any that do not decode to
        their text, white space aside."""
        names = side_names(row)
        if self._unknown is not None and any(self._unknown in sequence for sequence in sequences):
            return [
                Note(UNKNOWN, "characters", n) for n, ids in zip(names, sequences, strict=True) if self._unknown in ids
            ]
        if self._num_to_decode <= 0 or plan.is_marked:
            return []
        self._num_to_decode -= 1
        notes = []
        for name, text, ids in zip(names, plan.texts[1:], sequences, strict=True):
            wanted, decoded = self._characters(text), self._characters(self.texts.decode(ids))
            if wanted not in decoded:
                notes.append(Note(UNKNOWN, "characters", name, _difference(wanted, decoded)))
        return notes

    def _characters(self, text: str) -> str:
        """A text without white space, and without BOS and EOS, of which one or more stand at its ends."""
        for token in (self.tokenizer.bos_token, self.tokenizer.eos_token):
            text = text.replace(token, "") if token else text
        return "".join(text.split())


@dataclass(frozen=True)
class _TextPlan:
    """What is to be tokenized of a row of text: prompt and whole texts."""

    texts: list[str]
    is_marked: bool  # by `control`
    notes: list[Note]


def _to_tokenize(plan: _TextPlan | Chat | ValueError | None) -> list[str]:
    """The texts of a row that are tokenized together with other rows'."""
    if plan is None or isinstance(plan, ValueError) or plan.is_marked or (isinstance(plan, Chat) and plan.ids):
        return []
    return plan.texts


def side_names(row: PreferenceRow) -> tuple[str, ...]:
    """What the responses of a row are called in a report."""
    if len(row.responses) == 2 and tuple(row.preferences) == ((0, 1),):
        return ("chosen", "rejected")
    return ("responses",) * len(row.responses)


def truncate(group: TokenizedGroup, settings: TokenizationSettings) -> TokenizedGroup:
    """The group cut to `max_prompt_length`, then to `max_length` tokens per sequence, without reference log-probs then.

    keep_start cuts sequences at their end; a prompt that leaves no room for a response makes the row bad. keep_end
    keeps the last `max_length` tokens of each sequence by itself, which may leave prompts that differ. Example,
    max_length 4: prompt 1 2 3, chosen 4, rejected 5 6 gives 1 2 3 4 and 2 3 5 6, stored without a prompt, masks F F F T
    and F F T T.
    """
    keep_end = settings.truncation_mode == "keep_end"
    limit, length = settings.max_prompt_length, settings.max_length
    if settings.on_long_row != "truncate":
        _refuse_long(group, settings)
    prompt, responses, masks = list(group.prompt_ids), group.responses, group.loss_masks
    equal_reason = _EQUAL
    ref_logps = group.ref_logps
    if limit is not None and len(prompt) > limit:
        ref_logps = None  # those of the whole text, of which nothing can be taken away
        prompt = prompt[-limit:] if keep_end else prompt[:limit]
    if length is not None and len(prompt) + max(map(len, responses)) > length:
        ref_logps = None
        equal_reason = "chosen equals rejected after truncation"
        if keep_end:
            prompt, responses, masks = _keep_ends(prompt, responses, masks, length)
        elif len(prompt) >= length:
            raise BadRow("prompt fills max_length")
        else:
            responses = [list(response)[: length - len(prompt)] for response in responses]
            masks = [list(mask)[: length - len(prompt)] for mask in masks] if masks is not None else None
    return _checked(prompt, responses, masks, group.preferences, equal_reason, ref_logps)


def _refuse_long(group: TokenizedGroup, settings: TokenizationSettings) -> None:
    """Refuses a group that would be cut: with BadRow where such rows are left out, with ValueError where they stop.

    Raises:
        ValueError: the group has more tokens than `max_prompt_length` or `max_length`.
    """
    num_prompt = len(group.prompt_ids)
    counts = {"max_prompt_length": num_prompt, "max_length": num_prompt + max(map(len, group.responses))}
    for name, count in counts.items():
        most = getattr(settings, name)
        if most is None or count <= most:
            continue
        if settings.on_long_row == "drop":
            raise LeftOut(f"longer than {name}")
        raise ValueError(
            f"{name} must be at least {count} for all rows to be whole, got {most}; on_long_row='truncate' cuts them,"
            " 'drop' leaves them out"
        )


def _keep_ends(
    prompt: list[int], responses: Sequence[Sequence[int]], masks: Sequence[Sequence[bool]] | None, length: int
) -> tuple[list[int], Sequence[Sequence[int]], Sequence[Sequence[bool]] | None]:
    """The last `length` tokens of every sequence; the prompt stays apart only if all keep the same part of it."""
    full_masks = masks if masks is not None else [[True] * len(response) for response in responses]
    cuts = [max(0, len(prompt) + len(response) - length) for response in responses]
    kept_prompts = [prompt[cut:] for cut in cuts]
    kept = [list(response)[max(0, cut - len(prompt)) :] for cut, response in zip(cuts, responses, strict=True)]
    kept_masks = [list(mask)[-len(response) :] for mask, response in zip(full_masks, kept, strict=True)]
    if all(len(kept_prompt) == len(kept_prompts[0]) for kept_prompt in kept_prompts):
        return kept_prompts[0], kept, None if masks is None else kept_masks
    sequences = [start + response for start, response in zip(kept_prompts, kept, strict=True)]
    return [], sequences, [[False] * len(start) + mask for start, mask in zip(kept_prompts, kept_masks, strict=True)]


def _checked(
    prompt: Sequence[int],
    responses: Sequence[Sequence[int]],
    masks: Sequence[Sequence[bool]] | None,
    preferences: Sequence[tuple[int, int]],
    equal_reason: str,
    ref_logps: Sequence[float] | None = None,
) -> TokenizedGroup:
    """The group, after the checks that hold before and after truncation.

    Without a prompt token (and without a BOS) nothing predicts a response's first token: it is kept and not scored.
    """
    preferences = _different(preferences, [list(response) for response in responses], equal_reason)
    if not prompt:
        masks = masks if masks is not None else [[True] * len(response) for response in responses]
        masks = [[False, *list(mask)[1:]] for mask in masks]
        if not all(any(mask) for mask in masks):
            raise BadRow("empty prompt")
    elif masks is not None and not all(any(mask) for mask in masks):
        raise BadRow("no token of a response is scored")
    return TokenizedGroup(prompt, responses, masks, ref_logps, preferences)


def _different(
    preferences: Sequence[tuple[int, int]], responses: Sequence[Any], equal_reason: str
) -> tuple[tuple[int, int], ...]:
    """The preferences between different responses; a row that has none left cannot be used."""
    kept = tuple((chosen, rejected) for chosen, rejected in preferences if responses[chosen] != responses[rejected])
    if preferences and not kept:
        raise BadRow(equal_reason)
    return kept


def _unknown_id(tokenizer: Any) -> int | None:
    """The token for what has none; None where the tokenizer knows all, or GPT-2's manner makes it the EOS."""
    unknown: int | None = getattr(tokenizer, "unk_token_id", None)
    return None if unknown in (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) else unknown


def _num_shared(prompt: Ids, sequence: Ids) -> int:
    """How many tokens of the prompt the sequence begins with."""
    return len(prompt) if sequence[: len(prompt)] == prompt else common_prefix_length(prompt, sequence)


def _difference(text: str, decoded: str) -> str:
    """Where a text and its tokens part."""
    start = common_prefix_length(text, decoded)
    return f"{text[start : start + 20]!r} is {decoded[start : start + 20]!r}"


def _begin_once(first: list[int], ids: list[int], tokenizer: Any) -> list[int]:
    """`first + ids`, without the BOS that the text itself may already start with."""
    bos = tokenizer.bos_token_id
    while first and first[-1] == bos and ids and ids[0] == bos:
        ids = ids[1:]
    return first + ids


def _end_once(ids: list[int], tokenizer: Any) -> list[int]:
    """`ids` with exactly one EOS at the end, if the tokenizer knows one."""
    eos = tokenizer.eos_token_id
    if eos is None:
        return ids
    end = len(ids)
    while end > 0 and ids[end - 1] == eos:
        end -= 1
    return [*ids[:end], eos]
