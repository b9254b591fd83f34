"""From a `PreferenceRow` to a `TokenizedGroup`.

Two steps, both pure: `encode_row` (chat template, one BOS, one EOS, prompt tokens that are a prefix of every sequence)
and `truncate` (`max_prompt_length`, then `max_length`); `tokenize_row` is the two together. A row that cannot be used
raises BadRow; messages for a tokenizer without a chat template are a ValueError.

The same tokens as TRL 1.16's DPOTrainer, and four things it does not do: a BOS or EOS is never doubled, an EOS is
added to a conversation whose template leaves the turn open, only the assistant's tokens of a response of several turns
count (`turns`), and rows without a usable difference are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastdpo.data.formats import AUTO, check_columns, check_format_name
from fastdpo.data.forms import is_empty
from fastdpo.data.turns import assistant_mask, has_several_turns, marks_assistant, transcript_mask
from fastdpo.data.values import BadRow, common_prefix_length
from fastdpo.types import Message, PreferenceRow, TokenizedGroup

TRUNCATION_MODES = ("keep_start", "keep_end")
BAD_ROW_POLICIES = ("drop", "raise")
_EXAMPLE = "a"  # tokenized with each row, to see what the tokenizer puts around a text


@dataclass(frozen=True)
class TokenizationSettings:
    """How rows become tokens, and what happens to rows that cannot."""

    max_length: int | None = 1024  # tokens of prompt and one response; None leaves them whole
    max_prompt_length: int | None = None  # tokens of the prompt, cut before max_length is looked at
    truncation_mode: str = "keep_start"  # which end survives: "keep_start" or "keep_end"
    on_bad_row: str = "drop"  # "drop" counts and reports it, "raise" stops at the first
    dataset_format: str = AUTO  # a name of `formats.FORMAT_NAMES`; "auto" goes by the columns
    columns: Mapping[str, Any] | None = None  # what the dataset's columns are in our names, see `forms.mapping`
    rankings: bool = False  # preferences become the neighbouring pairs of a ranking, see `loss_rows`
    shared_parts: bool = False  # each pair also brings both responses up to the length that they share

    def __post_init__(self) -> None:
        check_format_name(self.dataset_format)
        object.__setattr__(self, "columns", check_columns(self.columns))
        for name, least in (("max_length", 2), ("max_prompt_length", 1)):  # one token alone has nothing to predict it
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < least):
                raise ValueError(f"{name} must be an integer >= {least} or None, got {value!r}")
        if self.truncation_mode not in TRUNCATION_MODES:
            raise ValueError(f"truncation_mode must be one of {TRUNCATION_MODES}, got {self.truncation_mode!r}")
        if self.on_bad_row not in BAD_ROW_POLICIES:
            raise ValueError(f"on_bad_row must be one of {BAD_ROW_POLICIES}, got {self.on_bad_row!r}")


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
    return truncate(encode_row(row, tokenizer, template_kwargs)[0], settings)


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
    for response in row.responses:
        if is_empty(response):
            raise BadRow("empty response")
    preferences = _different(row.preferences, row.responses, "chosen equals rejected")
    masks: list[list[bool]] | None = None
    if row.is_conversational:
        prompt_ids, sequences, masks = _encode_messages(row, tokenizer, template_kwargs or {})
    else:
        prompt_ids, sequences, masks = _encode_text(row, tokenizer)
    num_prompt = min(common_prefix_length(prompt_ids, sequence) for sequence in sequences)
    responses = [sequence[num_prompt:] for sequence in sequences]
    if any(len(response) == 0 for response in responses):  # a template that leaves the response out
        raise BadRow("empty response")
    if masks is not None:
        masks = [mask[num_prompt:] for mask in masks]
    group = _checked(prompt_ids[:num_prompt], responses, masks, preferences, "chosen equals rejected")
    return group, num_prompt < len(prompt_ids)


def truncate(group: TokenizedGroup, settings: TokenizationSettings) -> TokenizedGroup:
    """The group cut to `max_prompt_length`, then to `max_length` tokens per sequence, without reference log-probs then.

    keep_start cuts sequences at their end; a prompt that leaves no room for a response makes the row bad. keep_end
    keeps the last `max_length` tokens of each sequence by itself, which may leave prompts that differ. Example,
    max_length 4: prompt 1 2 3, chosen 4, rejected 5 6 gives 1 2 3 4 and 2 3 5 6, stored without a prompt, masks F F F T
    and F F T T.
    """
    keep_end = settings.truncation_mode == "keep_end"
    limit, length = settings.max_prompt_length, settings.max_length
    prompt, responses, masks = list(group.prompt_ids), group.responses, group.loss_masks
    equal_reason = "chosen equals rejected"
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


# --- text -------------------------------------------------------------------------------------------------------------


def _encode_text(row: PreferenceRow, tokenizer: Any) -> tuple[list[int], list[list[int]], list[list[bool]] | None]:
    """Prompt and whole sequences, each with the tokens that the tokenizer puts first; sequences end in one EOS.

    Masks of the sequences where the user speaks in a response, as in HH transcripts that part early.
    """
    texts = [str(row.prompt), *(f"{row.prompt}{response}" for response in row.responses)]
    bare, *texts_ids = tokenizer([_EXAMPLE, *texts], add_special_tokens=False, verbose=False)["input_ids"]
    first = _leading_special_ids(bare, tokenizer)
    prompt, *sequences = (_begin_once(first, list(ids), tokenizer) for ids in texts_ids)
    sequences = [_end_once(sequence, tokenizer) for sequence in sequences]
    if not has_several_turns(row):
        return prompt, sequences, None

    def encode(text: str) -> list[int]:
        return _begin_once(first, tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], tokenizer)

    pairs = zip(row.responses, sequences, strict=True)
    return prompt, sequences, [transcript_mask(str(row.prompt), str(text), ids, encode) for text, ids in pairs]


def _leading_special_ids(bare: list[int], tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text, such as [BOS]. Seen on an example: classes and files disagree on flags."""
    full = list(tokenizer(_EXAMPLE, verbose=False)["input_ids"])
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == list(bare):
            return full[:start]
    return []


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


# --- messages ---------------------------------------------------------------------------------------------------------


def _encode_messages(
    row: PreferenceRow, tokenizer: Any, template_kwargs: dict[str, Any]
) -> tuple[list[int], list[list[int]], list[list[bool]] | None]:
    """Prompt with the generation prompt, and whole conversations. The template says what BOS there is.

    Masks of the conversations where a response has several messages, which need not all be the assistant's.
    """
    if getattr(tokenizer, "chat_template", None) is None and "chat_template" not in template_kwargs:
        raise ValueError(
            "tokenizer must have a chat template for rows of messages, got none: set tokenizer.chat_template, "
            "or give the rows as text (prompt, chosen, rejected)"
        )
    if not row.prompt:
        raise BadRow("empty prompt")

    def render(messages: Sequence[Message], add_generation_prompt: bool = False) -> list[int]:
        return _templated(messages, tokenizer, add_generation_prompt=add_generation_prompt, **template_kwargs)[0]

    prompt = render(row.prompt, add_generation_prompt=True)  # type: ignore[arg-type]
    has_turns = has_several_turns(row)
    is_marked = has_turns and tokenizer.is_fast and marks_assistant(tokenizer, template_kwargs)  # else no offsets
    sequences, masks = [], []
    for response in row.responses:
        messages: list[Message] = [*row.prompt, *_without_final_eos(response, tokenizer)]  # type: ignore[list-item]
        ids, marked = _templated(messages, tokenizer, return_assistant_tokens_mask=is_marked, **template_kwargs)
        sequences.append(_close_turn(ids, tokenizer))
        if is_marked:
            ends = [messages[-1]["role"] == "assistant"] * (len(sequences[-1]) - len(ids))
            masks.append([*marked, *ends])
        elif has_turns:
            masks.append(assistant_mask(messages, len(row.prompt), sequences[-1], render, tokenizer.decode))
    return prompt, sequences, masks if has_turns else None


def _templated(messages: Any, tokenizer: Any, **kwargs: Any) -> tuple[list[int], list[bool]]:
    """The tokens, and which of them the template marks as the assistant's where that is asked for."""
    from jinja2 import TemplateError

    try:
        encoded = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, tokenizer_kwargs={"verbose": False}, **kwargs
        )
    except (TemplateError, TypeError) as error:  # TypeError: the template's own expressions, as "text" + a dict
        raise BadRow(f"the chat template refuses the messages ({error})") from None
    ids = list(encoded["input_ids"])
    marked = [bool(mark) for mark in encoded.get("assistant_masks", ())]
    bos = tokenizer.bos_token_id
    while bos is not None and ids[:2] == [bos, bos]:
        ids, marked = ids[1:], marked[1:]
    return ids, marked


def _without_final_eos(messages: Any, tokenizer: Any) -> list[Message]:
    """The messages, without an EOS that the last one spells out: the template, or `_close_turn`, adds it."""
    eos, last = tokenizer.eos_token, messages[-1]
    if not eos or not last["content"].endswith(eos):
        return list(messages)
    return [*messages[:-1], {**last, "content": last["content"].removesuffix(eos)}]


def _close_turn(ids: list[int], tokenizer: Any) -> list[int]:
    """`ids`, with an EOS unless the template has ended the turn by a special token (EOS, <|im_end|>, ...) of its own.

    White space may follow that token: many templates end in EOS and a newline, which stays, as in TRL.
    """
    eos = tokenizer.eos_token_id
    for last in reversed(ids):
        if tokenizer.decode([last]).strip():
            if not tokenizer.decode([last], skip_special_tokens=True).strip():
                return ids
            break
    return ids if eos is None else [*ids, eos]
