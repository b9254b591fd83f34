"""From one example to the columns of a `TokenizedGroup` and what is to be reported of it, and back.

In: an example of any format in `formats`, or already tokenized (`prompt_ids`, `chosen_ids`, `rejected_ids`, optionally
`ref_chosen_logps` and `ref_rejected_logps`, or the columns made here). Out: GROUP_COLUMNS and STATE_COLUMNS; a row that
cannot be used has its reason in `bad_row` and nothing else. Refused with ValueError: what `formats` refuses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fastdpo.data.formats import read_row, template_kwargs
from fastdpo.data.forms import as_transcript
from fastdpo.data.forms.columns import columns_text
from fastdpo.data.loading import raw_example
from fastdpo.data.loss_rows import as_ranking, with_shared_parts
from fastdpo.data.tokenization import TokenizationSettings, encode_row, truncate
from fastdpo.data.values import BadRow, best_response
from fastdpo.types import PreferenceRow, TokenizedGroup

GROUP_COLUMNS = ("prompt_ids", "responses", "loss_masks", "ref_logps", "preferences")
STATE_COLUMNS = (
    "bad_row",
    "is_truncated",
    "has_stale_ref_logps",
    "is_merged",
    "is_transcript",
    "num_prompt_tokens",
    "num_chosen_tokens",
    "num_rejected_tokens",
    "columns",
)


def group_from_columns(example: Mapping[str, Any]) -> TokenizedGroup:
    """The group in one row of a prepared dataset, or of one with the columns prompt_ids, chosen_ids, rejected_ids."""
    if "responses" in example:
        preferences = example.get("preferences")
        return TokenizedGroup(
            example["prompt_ids"],
            example["responses"],
            example.get("loss_masks"),
            example.get("ref_logps"),
            ((0, 1),) if preferences is None else tuple((chosen, rejected) for chosen, rejected in preferences),
        )
    return TokenizedGroup(
        example["prompt_ids"], (example["chosen_ids"], example["rejected_ids"]), ref_logps=_ref_logps(example)
    )


def column_features(*, with_state: bool = True) -> Any:
    """Spelled out, because a column that is None in the first thousand rows would be typed as null."""
    from datasets import Features, List, Value

    ids, count = List(Value("int32")), Value("int32")
    columns = {
        "prompt_ids": ids,
        "responses": List(ids),
        "loss_masks": List(List(Value("bool"))),
        "ref_logps": List(Value("float64")),
        "preferences": List(ids),
        "bad_row": Value("string"),
        "is_truncated": Value("bool"),
        "has_stale_ref_logps": Value("bool"),
        "is_merged": Value("bool"),
        "is_transcript": Value("bool"),
        "num_prompt_tokens": count,
        "num_chosen_tokens": List(count),  # of each pair; of the response where there is no pair
        "num_rejected_tokens": List(count),
        "columns": Value("string"),  # `columns_text` of what became of the row's columns
    }
    return Features({name: columns[name] for name in (*GROUP_COLUMNS, *(STATE_COLUMNS if with_state else ()))})


def prepare_example(
    example: Mapping[str, Any],
    row: int,
    tokenizer: Any,
    settings: TokenizationSettings,
    is_sft: bool,
    features: Any = None,
) -> dict[str, Any]:
    """The columns of one example; a row that cannot be used has only its reason.

    Args:
        row: its number, for errors.
        features: those of the dataset, whose Arrow has filled in what rows lack; None for examples out of Python.
    Raises:
        ValueError: what `formats` refuses, or a bad row where `settings.on_bad_row` is "raise".
    """
    try:
        whole, is_merged, is_transcript, columns = _encode(raw_example(example, features), tokenizer, settings, is_sft)
        group = truncate(whole, settings)
        group = as_ranking(group) if settings.rankings else group
        stored = with_shared_parts(group) if settings.shared_parts else group
    except BadRow as error:
        if settings.on_bad_row == "raise":
            raise ValueError(f"dataset row {row} (counted from 0) cannot be used: {error.reason}") from None
        return dict.fromkeys((*GROUP_COLUMNS, *STATE_COLUMNS)) | {"bad_row": error.reason}
    except ValueError as error:
        raise ValueError(f"{error} (dataset row {row}, counted from 0)") from None
    num_context = [_num_context_tokens(group, index) for index in range(len(group.responses))]
    lengths = [len(r) - n for r, n in zip(group.responses, num_context, strict=True)]
    return {
        "prompt_ids": group.prompt_ids,
        "responses": stored.responses,
        "loss_masks": stored.loss_masks,
        "ref_logps": stored.ref_logps,
        "preferences": stored.preferences,
        "bad_row": None,
        "is_truncated": _num_tokens(group) < _num_tokens(whole),
        "has_stale_ref_logps": whole.ref_logps is not None and group.ref_logps is None,
        "is_merged": is_merged,
        "is_transcript": is_transcript,
        "num_prompt_tokens": len(group.prompt_ids) + num_context[0],
        "num_chosen_tokens": [lengths[chosen] for chosen, _ in group.preferences] or lengths,
        "num_rejected_tokens": [lengths[rejected] for _, rejected in group.preferences],
        "columns": columns,
    }


def _encode(
    example: Mapping[str, Any], tokenizer: Any, settings: TokenizationSettings, is_sft: bool
) -> tuple[TokenizedGroup, bool, bool, str]:
    """The whole group, whether its prompt's end merged with a response, whether messages became a transcript, and what
    became of the columns."""
    if "prompt_ids" in example and ("responses" in example or {"chosen_ids", "rejected_ids"} <= example.keys()):
        return _tokenized_group(example, is_sft), False, False, ""
    row, row_format = read_row(example, settings.dataset_format, is_sft=is_sft, columns=settings.columns)
    kwargs = template_kwargs(example, settings.columns)
    has_template = getattr(tokenizer, "chat_template", None) is not None or "chat_template" in kwargs
    is_transcript = row_format.may_be_transcript and row.is_conversational and not has_template
    group, is_merged = encode_row(as_transcript(row) if is_transcript else row, tokenizer, kwargs)
    if not is_sft:
        group = replace(group, ref_logps=_ref_logps(example, row))
    return group, is_merged, is_transcript, columns_text(row.columns)


def _ref_logps(example: Mapping[str, Any], row: PreferenceRow | None = None) -> tuple[float, float] | None:
    """Reference log-probs that a row brings for its chosen and rejected response."""
    if row is not None and len(row.responses) != 2:
        return None
    chosen, rejected = example.get("ref_chosen_logps"), example.get("ref_rejected_logps")
    return None if chosen is None or rejected is None else (chosen, rejected)


def _tokenized_group(example: Mapping[str, Any], is_sft: bool) -> TokenizedGroup:
    responses = example["responses"] if "responses" in example else [example["chosen_ids"], example["rejected_ids"]]
    if example["prompt_ids"] is None or responses is None or any(response is None for response in responses):
        raise BadRow("response is not a list of token ids")
    if any(len(response) == 0 for response in responses):
        raise BadRow("empty response")
    group = group_from_columns(example)
    if not is_sft:
        if not group.preferences:
            raise BadRow("no response is better than another")
        return group
    chosen = best_response(group.preferences)
    masks = None if group.loss_masks is None else [group.loss_masks[chosen]]
    return TokenizedGroup(group.prompt_ids, [group.responses[chosen]], masks, preferences=())


def _num_context_tokens(group: TokenizedGroup, index: int) -> int:
    """Leading tokens of a response that are its own prompt (see TokenizedGroup)."""
    if group.loss_masks is None or len(group.prompt_ids) > 0:
        return 0
    return list(group.loss_masks[index]).index(True)


def _num_tokens(group: TokenizedGroup) -> int:
    return sum(len(group.prompt_ids) + len(response) for response in group.responses)
