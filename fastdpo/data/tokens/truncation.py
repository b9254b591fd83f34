"""Truncates a tokenized group to the lengths of a run, and checks groups before and after.

In: a `TokenizedGroup`. Out: the group to train on. Refused with BadRow: a group without a usable difference, or without
space for a response. Refused with LeftOut: a long group if `on_long_row` is "drop". Refused with ValueError: a long
group if `on_long_row` is "raise".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastdpo.data.tokens.settings import TokenizationSettings
from fastdpo.data.values import BadRow
from fastdpo.types import TokenizedGroup

EQUAL = "chosen equals rejected"


class LeftOut(BadRow):
    """A usable row that the settings drop, independent of `on_bad_row`."""


def truncate(group: TokenizedGroup, settings: TokenizationSettings) -> TokenizedGroup:
    """Truncates the group to `max_prompt_length`, then to `max_length` tokens per sequence; a cut group has no
    ref_logps.

    keep_start cuts sequences at their end; a prompt that leaves no space for a response makes the row bad. keep_end
    keeps the last `max_length` tokens of each sequence separately, so the prompts may differ afterwards. Example,
    max_length 4: prompt 1 2 3, chosen 4, rejected 5 6 gives 1 2 3 4 and 2 3 5 6, stored without a prompt, masks F F F T
    and F F T T.
    """
    keep_end = settings.truncation_mode == "keep_end"
    limit, length = settings.max_prompt_length, settings.max_length
    if settings.on_long_row != "truncate":
        _refuse_long(group, settings)
    prompt, responses, masks = list(group.prompt_ids), group.responses, group.loss_masks
    equal_reason = EQUAL
    ref_logps = group.ref_logps
    if limit is not None and len(prompt) > limit:
        ref_logps = None  # they belong to the whole text and cannot be split
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
    return checked_group(prompt, responses, masks, group.preferences, equal_reason, ref_logps)


def _refuse_long(group: TokenizedGroup, settings: TokenizationSettings) -> None:
    """Refuses a long group: with LeftOut if `on_long_row` is "drop", with ValueError if it is "raise".

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
            f"{name} must be at least {count} to keep this row whole, got {most}; to cut long rows set"
            " on_long_row='truncate', to drop them 'drop'"
        )


def _keep_ends(
    prompt: list[int], responses: Sequence[Sequence[int]], masks: Sequence[Sequence[bool]] | None, length: int
) -> tuple[list[int], Sequence[Sequence[int]], Sequence[Sequence[bool]] | None]:
    """The last `length` tokens of every sequence; the prompt stays separate only if all keep the same part of it."""
    full_masks = masks if masks is not None else [[True] * len(response) for response in responses]
    cuts = [max(0, len(prompt) + len(response) - length) for response in responses]
    kept_prompts = [prompt[cut:] for cut in cuts]
    kept = [list(response)[max(0, cut - len(prompt)) :] for cut, response in zip(cuts, responses, strict=True)]
    kept_masks = [list(mask)[-len(response) :] for mask, response in zip(full_masks, kept, strict=True)]
    if all(len(kept_prompt) == len(kept_prompts[0]) for kept_prompt in kept_prompts):
        return kept_prompts[0], kept, None if masks is None else kept_masks
    sequences = [start + response for start, response in zip(kept_prompts, kept, strict=True)]
    return [], sequences, [[False] * len(start) + mask for start, mask in zip(kept_prompts, kept_masks, strict=True)]


def checked_group(
    prompt: Sequence[int],
    responses: Sequence[Sequence[int]],
    masks: Sequence[Sequence[bool]] | None,
    preferences: Sequence[tuple[int, int]],
    equal_reason: str,
    ref_logps: Sequence[float] | None = None,
) -> TokenizedGroup:
    """Returns the group after the checks that apply before and after truncation.

    Without a prompt token (and without a BOS) nothing predicts a response's first token, so it is kept but not scored.
    """
    preferences = different_pairs(preferences, [list(response) for response in responses], equal_reason)
    if not prompt:
        masks = masks if masks is not None else [[True] * len(response) for response in responses]
        masks = [[False, *list(mask)[1:]] for mask in masks]
        if not all(any(mask) for mask in masks):
            raise BadRow("empty prompt")
    elif masks is not None and not all(any(mask) for mask in masks):
        raise BadRow("no token of a response is scored")
    return TokenizedGroup(prompt, responses, masks, ref_logps, preferences)


def different_pairs(
    preferences: Sequence[tuple[int, int]], responses: Sequence[Any], equal_reason: str
) -> tuple[tuple[int, int], ...]:
    """The preferences between different responses; a row without any is unusable."""
    kept = tuple((chosen, rejected) for chosen, rejected in preferences if responses[chosen] != responses[rejected])
    if preferences and not kept:
        raise BadRow(equal_reason)
    return kept
