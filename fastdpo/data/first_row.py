"""The first row of a dataset, read before anything else is done, so that columns of no form are said at once.

In: a dataset, raw or tokenized. Out: nothing. Refused: what `formats` refuses of a dataset. A row that is only bad by
itself is left to the report.
"""

from __future__ import annotations

from typing import Any

from fastdpo.data.formats import choose_format, read_row
from fastdpo.data.loading import raw_example
from fastdpo.data.tokenization import TokenizationSettings
from fastdpo.data.values import BadRow


def check_first_row(dataset: Any, name: str, settings: TokenizationSettings, *, is_sft: bool) -> None:
    """Raises:
    ValueError: the dataset is none that can be iterated, or its first row is of no known form.
    """
    try:
        example = next(iter(dataset), None)
    except TypeError:  # no dataset: said where it is prepared, by its type
        return
    if not isinstance(example, dict):  # empty, or something else than rows: said there too
        return
    example = dict(raw_example(example))
    if "prompt_ids" in example:
        return
    try:
        if choose_format(example, settings.dataset_format, is_sft=is_sft).regroup is not None:
            return  # rows that are no prompts by themselves
        read_row(example, settings.dataset_format, is_sft=is_sft)
    except BadRow:
        return
    except ValueError as error:
        raise ValueError(f"{error} ({name} dataset)") from None
