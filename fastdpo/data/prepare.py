"""From a dataset of examples to a dataset of token columns, and the report of what happened on the way.

In: a `datasets.Dataset`, or a list of dicts, of any format in `formats`, or already tokenized (`prompt_ids`,
`chosen_ids`, `rejected_ids`, optionally `ref_chosen_logps` and `ref_rejected_logps`, or the columns made here).
Out: for the rows that can be used, the columns of a `TokenizedGroup`, which `group_from_columns` turns back into one.
They are kept in datasets' cache, so that the same rows, tokenizer and settings are tokenized once, whatever the run.
Refused with ValueError: what `formats` refuses, a tokenizer that is none, a dataset of which nothing is left.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fastdpo.data.arrow import arrow_column
from fastdpo.data.cache import cache_file, tokens_fingerprint
from fastdpo.data.formats import preference_row, sft_row, template_kwargs
from fastdpo.data.loading import dataset_from_rows, raw_example
from fastdpo.data.report import DataReport, TokenStats
from fastdpo.data.tokenization import TokenizationSettings, encode_row, truncate
from fastdpo.data.values import BadRow
from fastdpo.types import TokenizedGroup

if TYPE_CHECKING:
    from datasets import Dataset

GROUP_COLUMNS = ("prompt_ids", "responses", "loss_masks", "ref_logps", "preferences")
MEDIA_FEATURES = ("Image(", "Video(", "Audio(")  # refused before a row is read, which would decode them
STATE_COLUMNS = ("bad_row", "is_truncated", "is_merged", "num_prompt_tokens", "num_response_tokens")


def prepare_preference_dataset(
    dataset: Dataset | Sequence[Mapping[str, Any]],
    tokenizer: Any,
    settings: TokenizationSettings,
    *,
    num_proc: int | None = None,
    desc: str | None = None,
) -> tuple[Dataset, DataReport]:
    """Tokenize preference pairs.

    Args:
        dataset: raw or tokenized examples.
        tokenizer: a transformers tokenizer, with a chat template if rows are conversational.
        num_proc: processes for `Dataset.map`; None stays in this one.
        desc: label of the progress bar.
    Returns:
        The dataset with GROUP_COLUMNS (None where a row has no loss_masks or ref_logps), one row per usable example in
        the given order, and the report.
    Raises:
        ValueError: no row is usable, a bad row where `settings.on_bad_row` is "raise", or what `formats` refuses.
    """
    return _prepare(dataset, tokenizer, settings, is_sft=False, num_proc=num_proc, desc=desc)


def prepare_sft_dataset(
    dataset: Dataset | Sequence[Mapping[str, Any]],
    tokenizer: Any,
    settings: TokenizationSettings,
    *,
    num_proc: int | None = None,
    desc: str | None = None,
) -> tuple[Dataset, DataReport]:
    """As `prepare_preference_dataset` for supervised fine-tuning: one response per row, no preference."""
    return _prepare(dataset, tokenizer, settings, is_sft=True, num_proc=num_proc, desc=desc)


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


def _prepare(
    dataset: Any,
    tokenizer: Any,
    settings: TokenizationSettings,
    *,
    is_sft: bool,
    num_proc: int | None,
    desc: str | None,
) -> tuple[Dataset, DataReport]:
    if hasattr(tokenizer, "image_processor") or not callable(tokenizer):
        raise ValueError(f"tokenizer must be a text tokenizer, got {type(tokenizer).__name__}")
    dataset = _checked_dataset(dataset)
    fingerprint = tokens_fingerprint(dataset, tokenizer, settings=settings, is_sft=is_sft)
    prepared = dataset.map(
        _prepare_example,
        with_indices=True,
        fn_kwargs={"tokenizer": tokenizer, "settings": settings, "is_sft": is_sft},
        remove_columns=dataset.column_names,
        features=_features(),
        num_proc=num_proc,
        desc=desc or "Tokenizing",
        new_fingerprint=fingerprint,
        cache_file_name=cache_file(dataset, fingerprint),
    )
    report = _report(prepared.select_columns(list(STATE_COLUMNS)), "examples" if is_sft else "pairs")
    if report.num_kept == 0:
        raise ValueError("dataset must hold at least one usable row: " + " ".join(report.lines()))
    if report.num_kept < report.num_rows:
        dropped = {row for rows in report.dropped.values() for row in rows}
        prepared = prepared.select([row for row in range(len(prepared)) if row not in dropped])
    return prepared.select_columns(list(GROUP_COLUMNS)), report


def _checked_dataset(dataset: Any) -> Dataset:
    """The dataset as a Dataset that has rows and no column of images, video or audio."""
    from datasets import Dataset

    if isinstance(dataset, (list, tuple)):
        dataset = dataset_from_rows(dataset)
    if not isinstance(dataset, Dataset):
        kind = type(dataset).__name__
        raise ValueError(f"dataset must be a datasets.Dataset (one split, not streamed) or a list of dicts, got {kind}")
    media = [name for name, kind in dataset.features.items() if any(word in repr(kind) for word in MEDIA_FEATURES)]
    if media:
        raise ValueError(f"dataset must hold text only, got the columns {media}; vision and audio are not supported")
    if len(dataset) == 0:
        raise ValueError("dataset must hold at least one row, got none")
    return dataset


def _features() -> Any:
    """Spelled out, because a column that is None in the first thousand rows would be typed as null."""
    from datasets import Features, List, Value

    ids, count = List(Value("int32")), Value("int32")
    return Features(
        prompt_ids=ids,
        responses=List(ids),
        loss_masks=List(List(Value("bool"))),
        ref_logps=List(Value("float64")),
        preferences=List(ids),
        bad_row=Value("string"),
        is_truncated=Value("bool"),
        is_merged=Value("bool"),
        num_prompt_tokens=count,
        num_response_tokens=List(count),
    )


def _prepare_example(
    example: Mapping[str, Any], row: int, tokenizer: Any, settings: TokenizationSettings, is_sft: bool
) -> dict[str, Any]:
    """The columns of one example; a row that cannot be used has only its reason."""
    try:
        whole, is_merged = _encode(raw_example(example), tokenizer, is_sft)
        group = truncate(whole, settings)
    except BadRow as error:
        if settings.on_bad_row == "raise":
            raise ValueError(f"dataset row {row} (counted from 0) cannot be used: {error.reason}") from None
        return dict.fromkeys((*GROUP_COLUMNS, *STATE_COLUMNS)) | {"bad_row": error.reason}
    except ValueError as error:
        raise ValueError(f"{error} (dataset row {row}, counted from 0)") from None
    num_context = [_num_context_tokens(group, index) for index in range(len(group.responses))]
    return {
        "prompt_ids": group.prompt_ids,
        "responses": group.responses,
        "loss_masks": group.loss_masks,
        "ref_logps": group.ref_logps,
        "preferences": group.preferences,
        "bad_row": None,
        "is_truncated": _num_tokens(group) < _num_tokens(whole),
        "is_merged": is_merged,
        "num_prompt_tokens": len(group.prompt_ids) + num_context[0],
        "num_response_tokens": [len(r) - n for r, n in zip(group.responses, num_context, strict=True)],
    }


def _encode(example: Mapping[str, Any], tokenizer: Any, is_sft: bool) -> tuple[TokenizedGroup, bool]:
    if "prompt_ids" in example and ("responses" in example or {"chosen_ids", "rejected_ids"} <= example.keys()):
        return _tokenized_group(example, is_sft), False
    row = sft_row(example) if is_sft else preference_row(example)
    group, is_merged = encode_row(row, tokenizer, template_kwargs(example))
    if not is_sft:
        group = replace(group, ref_logps=_ref_logps(example))
    return group, is_merged


def _ref_logps(example: Mapping[str, Any]) -> tuple[float, float] | None:
    """Reference log-probs that a row brings for its chosen and rejected response."""
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
        return group
    chosen = group.preferences[0][0] if group.preferences else 0
    masks = None if group.loss_masks is None else [group.loss_masks[chosen]]
    return TokenizedGroup(group.prompt_ids, [group.responses[chosen]], masks, preferences=())


def _num_context_tokens(group: TokenizedGroup, index: int) -> int:
    """Leading tokens of a response that are its own prompt (see TokenizedGroup)."""
    if group.loss_masks is None or len(group.prompt_ids) > 0:
        return 0
    return list(group.loss_masks[index]).index(True)


def _num_tokens(group: TokenizedGroup) -> int:
    return sum(len(group.prompt_ids) + len(response) for response in group.responses)


def _report(states: Dataset, kind: str) -> DataReport:
    import pyarrow.compute as pc

    columns = {name: arrow_column(states, name) for name in STATE_COLUMNS}
    dropped: dict[str, list[int]] = defaultdict(list)
    for row in pc.indices_nonzero(columns["bad_row"].is_valid()).to_pylist():
        dropped[columns["bad_row"][row].as_py()].append(row)
    lengths = {"prompt": columns["num_prompt_tokens"].drop_null()}
    responses = columns["num_response_tokens"].drop_null()
    for index, name in enumerate(("chosen", "rejected") if kind == "pairs" else ("response",)):
        lengths[name] = pc.list_element(responses, index)
    return DataReport(
        kind=kind,
        num_rows=len(states),
        num_kept=len(responses),
        dropped={reason: tuple(rows) for reason, rows in dropped.items()},
        num_truncated=pc.sum(columns["is_truncated"], min_count=0).as_py(),
        num_merged_boundary=pc.sum(columns["is_merged"], min_count=0).as_py(),
        tokens={name: TokenStats.of(column.to_pylist()) for name, column in lengths.items() if len(column)},
    )
