"""Finds what the responses to one prompt share: a TokenizedGroup in, a GroupLayout for packing out.

The first sequence (prompt and response) is computed whole. Every other sequence that differs is a branch, which shares
its longest common prefix with the first. Equal sequences share one branch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastdpo.types import TokenizedGroup


@dataclass(frozen=True)
class CountedSequence:
    """One prompt with one response."""

    tokens: np.ndarray  # (L,) int64
    is_counted: np.ndarray  # (L,) bool: the token's log-prob belongs to the sum


def counted_sequences(group: TokenizedGroup) -> list[CountedSequence]:
    """Each response behind the prompt.

    Raises:
        ValueError: the group holds something else than token ids.
    """
    prompt = _token_ids("prompt_ids", group.prompt_ids)
    sequences = []
    for index, response in enumerate(group.responses):
        mask = np.ones(len(response), dtype=bool)
        if group.loss_masks is not None:
            mask = np.asarray(group.loss_masks[index], dtype=bool)
            if mask.shape != (len(response),):
                raise ValueError(f"loss_masks must hold lists of true and false, got {group.loss_masks[index]!r}")
        is_counted = np.concatenate([np.zeros(len(prompt), dtype=bool), mask])
        is_counted[0] = False  # no row predicts the first token
        sequences.append(CountedSequence(np.concatenate([prompt, _token_ids("responses", response)]), is_counted))
    return sequences


def _token_ids(name: str, ids: Sequence[int]) -> np.ndarray:
    """(L,) int64. Without a dtype NumPy says what it found; with one it would cut 1.5 to 1."""
    try:
        found = np.asarray(ids)
    except (TypeError, ValueError, OverflowError):  # lists of unequal lengths
        found = np.asarray(None)
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
        raise ValueError(f"{name} must hold lists of token ids, got {ids!r}")
    return found.astype(np.int64)


@dataclass
class Branch:
    """The tokens to compute for one sequence, or for several equal ones."""

    tokens: np.ndarray  # (L,) int64, from the group's first token on
    is_counted: np.ndarray  # (L,) bool: some sequence counts the token, and this branch computes it
    num_shared: int  # leading tokens that the group's first branch computes


@dataclass(frozen=True)
class GroupLayout:
    """The layout of a group in a packed row: its sequences, and the branches that compute them."""

    group: TokenizedGroup
    example_ids: tuple[int, ...]  # (K,) which example of the batch brought each sequence
    sequences: list[CountedSequence]
    branches: list[Branch]
    branch_of: list[int]  # (K,)

    @property
    def num_tokens(self) -> int:
        """Number of tokens in the packed row; shared tokens count once."""
        return sum(len(branch.tokens) - branch.num_shared for branch in self.branches)


def lay_out(group: TokenizedGroup, example_ids: tuple[int, ...], *, prefix_sharing: bool = True) -> GroupLayout:
    """Lays out a group; with `prefix_sharing=False` its sequences share no tokens."""
    sequences = counted_sequences(group)
    branches: list[Branch] = []
    branch_of: list[int] = []
    index_of: dict[bytes, int] = {}
    for k, sequence in enumerate(sequences):
        index = index_of.setdefault(sequence.tokens.tobytes(), len(branches)) if prefix_sharing else k
        branch_of.append(index)
        if index < len(branches):
            branches[index].is_counted = branches[index].is_counted | sequence.is_counted
            continue
        num_shared = _common_prefix_length(sequences[0].tokens, sequence.tokens) if prefix_sharing and k else 0
        branches.append(Branch(sequence.tokens, sequence.is_counted, num_shared))
    first = branches[0]
    for branch in branches[1:]:
        n = branch.num_shared
        if not np.array_equal(first.is_counted[:n], branch.is_counted[:n]):
            counted = first.is_counted[:n] | branch.is_counted[:n]
            first.is_counted = np.concatenate([counted, first.is_counted[n:]])
    return GroupLayout(group, example_ids, sequences, branches, branch_of)


def _common_prefix_length(first: np.ndarray, second: np.ndarray) -> int:
    """Length of the common prefix, leaving each sequence at least one token of its own."""
    length = min(len(first), len(second)) - 1
    differs = first[:length] != second[:length]
    return int(differs.argmax()) if differs.any() else length
