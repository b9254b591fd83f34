"""Finds rows that nearly repeat an earlier one, by MinHash (Broder 1997) and locality-sensitive hashing (`datasketch`).

In: rows, one by one. Out: for each near duplicate, the number of the earlier row. Two rows are near duplicates if both
their prompts and their answers have a Jaccard similarity of NEAR_SIMILARITY or more. Rows with the same prompt that
share only one answer, or with the same answers but the opposite preference, are not. A text is the set of its runs of
SHINGLE bytes. Long texts are represented by the SKETCH smallest hashes, an unbiased sample that estimates similarity
with an error of some hundredths.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastdpo.inspection.source import ReadRow
from fastdpo.inspection.survey import Part, text_of
from fastdpo.inspection.thresholds import NEAR_SIMILARITY, SHINGLE

SKETCH = 128  # number of hashes kept of the prompt, and of the answers
NUM_PERM = 64  # permutations of MinHash, which only finds candidates; sketches then decide
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio: spreads the bytes over all bits
_PLAIN, _WORSE = np.uint32(0), np.uint32(0x5BD1E995)  # any two constants: they make the hashes of both kinds differ
_ANSWERS = np.uint32(0x80000000)  # marks the hashes of answers, so that prompts and answers never match


def is_available() -> bool:
    """Whether datasketch and its dependency scipy are installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("datasketch", "scipy"))


class NearDuplicates:
    """Compares each added row with the earlier ones.

    Raises:
        ImportError: datasketch is not installed.
    """

    def __init__(self, similarity: float = NEAR_SIMILARITY) -> None:
        from datasketch import MinHash, MinHashLSH

        self.found: dict[int, int] = {}  # row -> the first row that it nearly repeats
        self._similarity = similarity
        self._empty = MinHash(num_perm=NUM_PERM, hashfunc=int)
        # candidates match in prompt and answers together; the lower threshold allows for errors of both estimates
        self._index = MinHashLSH(threshold=max(0.1, similarity - 0.1), num_perm=NUM_PERM)
        self._sketches: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def add(self, read: ReadRow) -> None:
        """Adds a usable row. A near duplicate is recorded in `found`, and later rows are not compared with it."""
        assert read.row is not None
        prompt = sketch([read.row.prompt])
        worse = {rejected for _, rejected in read.row.preferences}
        answers = sketch(read.row.responses, [index in worse for index in range(len(read.row.responses))])
        minhash: Any = self._empty.copy()
        minhash.update_batch([*(prompt >> 1).tolist(), *((answers >> 1) | _ANSWERS).tolist()])
        for number in sorted(self._index.query(minhash)):
            other_prompt, other_answers = self._sketches[number]
            if min(jaccard(prompt, other_prompt), jaccard(answers, other_answers)) >= self._similarity:
                self.found[read.number] = number
                return
        self._index.insert(read.number, minhash)
        self._sketches[read.number] = (prompt, answers)


def sketch(parts: Sequence[Part], are_worse: Sequence[bool] | None = None) -> np.ndarray:
    """The SKETCH smallest hashes of the texts' shingles, (<= SKETCH,) uint32, ascending.

    Args:
        are_worse: for each text, whether another one is preferred to it. Its shingles then get different hashes.
    """
    hashes = np.concatenate(
        [
            _shingle_hashes(text_of(part).strip().encode()) ^ (_WORSE if is_worse else _PLAIN)
            for part, is_worse in zip(parts, are_worse or [False] * len(parts), strict=True)
        ]
    )
    if len(hashes) > 4 * SKETCH:  # sorting all would take most of the time
        smallest = np.unique(np.partition(hashes, 2 * SKETCH)[: 2 * SKETCH])
        if len(smallest) >= SKETCH:  # otherwise the text repeats itself
            return smallest[:SKETCH]
    return np.unique(hashes)[:SKETCH]


def jaccard(sketch: np.ndarray, other: np.ndarray) -> float:
    """The estimated Jaccard similarity of two sets: the share of the smallest hashes of their union that both have."""
    both = np.union1d(sketch, other)
    if len(sketch) == SKETCH or len(other) == SKETCH:
        both = both[:SKETCH]
    return float(np.isin(both, np.intersect1d(sketch, other), assume_unique=True).mean())


def _shingle_hashes(data: bytes) -> np.ndarray:
    """(n,) uint32, one hash of each run of SHINGLE bytes; a shorter text has one hash of the whole text."""
    padded = data.ljust(SHINGLE, b"\0")
    words = np.ndarray(len(padded) - SHINGLE + 1, dtype="<u8", buffer=padded, strides=(1,))  # overlapping
    mixed = (words ^ (words >> np.uint64(32))) * _MULTIPLIER
    mixed = (mixed ^ (mixed >> np.uint64(29))) * _MULTIPLIER
    return (mixed >> np.uint64(32)).astype(np.uint32)
