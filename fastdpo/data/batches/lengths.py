"""Row lengths of a prepared dataset, and which rows have the same prompt, computed from its Arrow columns."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdpo.data.sources.arrow import arrow_column

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class RowLengths:
    """Tokens of N rows with M responses."""

    prompts: np.ndarray  # (N,) int64
    responses: np.ndarray  # (M,) int64, of each response of each row
    rows: np.ndarray  # (M,) int64, the row of each response

    @property
    def sequences(self) -> np.ndarray:
        """(M,) tokens of each prompt with one response."""
        return self.prompts[self.rows] + self.responses

    def per_row(self, values: np.ndarray) -> np.ndarray:
        """(M,) values of responses, summed to (N,)."""
        sums = np.zeros(len(self.prompts), dtype=values.dtype)
        np.add.at(sums, self.rows, values)
        return sums


def row_lengths(dataset: Dataset) -> RowLengths:
    """The lengths of every row of a prepared dataset."""
    import pyarrow.compute as pc

    responses = arrow_column(dataset, "responses")
    num_responses = _numpy(pc.list_value_length(responses))
    return RowLengths(
        prompts=_numpy(pc.list_value_length(arrow_column(dataset, "prompt_ids"))),
        responses=_numpy(pc.list_value_length(pc.list_flatten(responses))),
        rows=np.repeat(np.arange(len(num_responses)), num_responses),
    )


def prompt_numbers(dataset: Dataset) -> np.ndarray:
    """(N,) int64: one number per distinct prompt, counted in order of first appearance."""
    import pyarrow.compute as pc

    prompts = arrow_column(dataset, "prompt_ids")
    tokens = _numpy(pc.list_flatten(prompts))
    numbers: dict[bytes, int] = {}
    result = []
    start = 0
    for end in _numpy(pc.list_value_length(prompts)).cumsum().tolist():
        digest = hashlib.blake2b(tokens[start:end].tobytes(), digest_size=16).digest()
        result.append(numbers.setdefault(digest, len(numbers)))
        start = end
    return np.asarray(result, dtype=np.int64)


def _numpy(array: Any) -> np.ndarray:
    return array.to_numpy(zero_copy_only=False).astype(np.int64)
