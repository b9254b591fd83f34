"""Reads rows that bring token ids and reference log-probs: one example in, a checked TokenizedGroup or log-probs out.

Refused with BadRow: ids that are no token ids, masks, preferences and log-probs that do not belong to the responses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastdpo.data.values import BadRow, best_response
from fastdpo.types import PreferenceRow, TokenizedGroup

_MOST_ID = 2**31 - 1  # token ids are stored as int32; whether the model has them is checked with the model


def is_tokenized(example: Mapping[str, Any]) -> bool:
    """Whether a row brings token ids."""
    return "prompt_ids" in example and ("responses" in example or {"chosen_ids", "rejected_ids"} <= example.keys())


def tokenized_group(example: Mapping[str, Any], *, is_sft: bool) -> TokenizedGroup:
    """The group of a row with the columns prompt_ids and chosen_ids and rejected_ids, or prompt_ids and responses.

    Raises:
        BadRow: see above.
    """
    prompt = _ids(example["prompt_ids"], "prompt_ids")
    if "responses" in example:
        responses = [_ids(response, "response") for response in _list(example["responses"], "responses", "lists")]
        preferences, ref_logps = _preferences(example.get("preferences"), len(responses)), example.get("ref_logps")
    else:
        responses = [_ids(example[f"{side}_ids"], f"{side}_ids") for side in ("chosen", "rejected")]
        preferences, ref_logps = ((0, 1),), row_ref_logps(example)
    if not responses or any(len(response) == 0 for response in responses):
        raise BadRow("empty response")
    masks = None if example.get("loss_masks") is None else _masks(example["loss_masks"], responses)
    if is_sft:
        best = best_response(preferences)
        return TokenizedGroup(prompt, [responses[best]], None if masks is None else [masks[best]], preferences=())
    if not preferences:
        raise BadRow("no response is better than another")
    if ref_logps is not None:
        ref_logps = _list(ref_logps, "ref_logps", "log-probs")
        if len(ref_logps) != len(responses):
            raise BadRow("ref_logps has another length than responses")
        ref_logps = [_log_prob(value, "ref_logps") for value in ref_logps]
    return TokenizedGroup(prompt, responses, masks, ref_logps, preferences)


def row_ref_logps(example: Mapping[str, Any], row: PreferenceRow | None = None) -> tuple[float, float] | None:
    """The row's own reference log-probs for its chosen and rejected response; None if it lacks one of them.

    Raises:
        BadRow: one of them is not a finite number.
    """
    if row is not None and len(row.responses) != 2:
        return None
    chosen, rejected = example.get("ref_chosen_logps"), example.get("ref_rejected_logps")
    if chosen is None or rejected is None:
        return None
    return _log_prob(chosen, "ref_chosen_logps"), _log_prob(rejected, "ref_rejected_logps")


def _log_prob(value: Any, name: str) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not -1e38 < value < 1e38:  # False for nan too; sums are fp32
        raise BadRow(f"{name} is not a finite number")
    return float(value)


def _list(value: Any, name: str, kind: str) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)):
        value = value.tolist() if hasattr(value, "tolist") else value  # an array or a tensor
        if not isinstance(value, list):
            raise BadRow(f"{name} is not a list of {kind}")
    return value


def _ids(value: Any, name: str) -> Sequence[int]:
    ids = _list(value, name, "token ids")
    if not all(type(token) is int and -_MOST_ID <= token <= _MOST_ID for token in ids):
        raise BadRow(f"{name} is not a list of token ids")
    return ids


def _masks(value: Any, responses: Sequence[Sequence[int]]) -> list[Sequence[bool]]:
    masks = [_list(mask, "loss_masks", "lists of true and false") for mask in _list(value, "loss_masks", "lists")]
    if [len(mask) for mask in masks] != [len(response) for response in responses]:
        raise BadRow("loss_masks have other lengths than the responses")
    if not all(isinstance(kept, int) and kept in (0, 1) for mask in masks for kept in mask):  # bool is an int
        raise BadRow("loss_masks do not hold true and false only")
    return [[bool(kept) for kept in mask] for mask in masks]


def _preferences(value: Any, num_responses: int) -> tuple[tuple[int, int], ...]:
    """Pairs of (better, worse); the first response is better than the second if there are none."""
    if value is None:
        return ((0, 1),) if num_responses > 1 else ()
    pairs = []
    for pair in _list(value, "preferences", "pairs"):
        pair = _list(pair, "preferences", "pairs")
        if len(pair) != 2 or not all(type(side) is int and 0 <= side < num_responses for side in pair):
            raise BadRow("preferences are not pairs of indices of responses")
        if pair[0] == pair[1]:
            raise BadRow("preferences compare a response with itself")
        pairs.append((pair[0], pair[1]))
    return tuple(pairs)
