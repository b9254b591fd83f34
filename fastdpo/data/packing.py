"""Groups of token ids in, one PackedBatch out: packed without padding and with shared prefixes, or padded where a
model needs it.

Two pairs, prompts [1 2] and [6], responses [3 4] / [5] and [7] / [8 9]:

    input_ids     1 2 3 4 | 5 | 6 7 | 8 9     prompt + chosen, then the rejected branch, for each pair
    position_ids  0 1 2 3 | 2 | 0 1 | 1 2     a branch goes on from its prefix's end
    segments      (0,4, 0,0) (4,5, 0,2) (5,7, 0,0) (7,9, 5,6)     queries 4..5 also see the keys of rows 0..2
    labels        3 4 5 7 8 9
    logit_rows    1 2 1 5 5 7                 row 1, the prompt's end, predicts both 3 and 5
    cu_seqlens    0 2 3 4 6                   token_rows is 0 1 2 3 4 5 here: no response token is shared
    group_ends    (3, 3, 2, 1) (6, 6, 4, 2)   rows, tokens, sequences and pairs up to the end of each group

The shared prefix is the longest common start of a group's sequences, so it also takes in response tokens that all
branches begin with; every branch keeps at least one token of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fastdpo.data.varlen import varlen_layout
from fastdpo.types import PackedBatch, TokenizedGroup


@dataclass(frozen=True)
class _Sequence:
    """One prompt with one response."""

    tokens: np.ndarray  # (L,) int64
    is_counted: np.ndarray  # (L,) bool: the token's log-prob belongs to the sum


def _sequences(group: TokenizedGroup) -> list[_Sequence]:
    prompt = np.asarray(group.prompt_ids, dtype=np.int64)
    sequences = []
    for index, response in enumerate(group.responses):
        mask = np.ones(len(response), dtype=bool)
        if group.loss_masks is not None:
            mask = np.asarray(group.loss_masks[index], dtype=bool)
        is_counted = np.concatenate([np.zeros(len(prompt), dtype=bool), mask])
        is_counted[0] = False  # nothing stands before the first token to predict it from
        sequences.append(_Sequence(np.concatenate([prompt, np.asarray(response, dtype=np.int64)]), is_counted))
    return sequences


def _common_prefix_length(sequences: list[_Sequence]) -> int:
    """Tokens that all sequences start with, leaving every sequence at least one token of its own."""
    length = min(len(s.tokens) for s in sequences) - 1
    first = sequences[0].tokens[:length]
    for sequence in sequences[1:]:
        differs = np.flatnonzero(first != sequence.tokens[: len(first)])
        if len(differs):
            first = first[: differs[0]]
    return len(first)


class _BatchBuilder:
    """What packed and padded layouts have in common: pairs, labels, and which row predicts what."""

    def __init__(self) -> None:
        self.pairs: list[tuple[int, int]] = []
        self.logit_rows: list[np.ndarray] = []
        self.labels: list[np.ndarray] = []
        self.token_rows: list[np.ndarray] = []
        self.num_rows = 0  # R so far
        self.num_tokens = 0
        self.num_counted = 0  # N so far
        self.group_ends: list[tuple[int, int, int, int]] = []
        self.ref_logps: list[float] | None = []

    def add_rows(self, logit_rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Appends rows for the head and returns their indices r."""
        self.logit_rows.append(logit_rows)
        self.labels.append(labels)
        self.num_rows += len(labels)
        return np.arange(self.num_rows - len(labels), self.num_rows)

    def add_sequence(self, token_rows: np.ndarray, num_tokens: int) -> None:
        self.token_rows.append(token_rows)
        self.num_counted += len(token_rows)
        self.num_tokens += num_tokens

    def add_group(self, group: TokenizedGroup) -> None:
        first = len(self.token_rows)
        self.pairs.extend((first + chosen, first + rejected) for chosen, rejected in group.preferences)
        if group.ref_logps is None or self.ref_logps is None:
            self.ref_logps = None
        else:
            self.ref_logps.extend(group.ref_logps)

    def end_group(self) -> None:
        self.group_ends.append((self.num_rows, self.num_counted, len(self.token_rows), len(self.pairs)))

    def build(self, input_ids: torch.Tensor, position_ids: torch.Tensor, **layout) -> PackedBatch:
        lengths = [0, *(len(rows) for rows in self.token_rows)]
        return PackedBatch(
            pairs=torch.tensor(self.pairs, dtype=torch.int64).reshape(-1, 2),
            input_ids=input_ids,
            position_ids=position_ids,
            logit_rows=_concatenate(self.logit_rows),
            labels=_concatenate(self.labels),
            token_rows=_concatenate(self.token_rows),
            cu_seqlens=torch.tensor(lengths, dtype=torch.int64).cumsum(0),
            num_tokens=self.num_tokens,
            group_ends=tuple(self.group_ends),
            ref_logps=torch.tensor(self.ref_logps, dtype=torch.float32) if self.ref_logps else None,
            **layout,
        )


def _concatenate(parts: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, dtype=np.int64))


def pack_pairs(groups: Sequence[TokenizedGroup], *, prefix_sharing: bool = True) -> PackedBatch:
    """Lays all groups out in one row without padding.

    Args:
        groups: prompts with their responses; the pairs of the batch are the groups' preferences, in order.
        prefix_sharing: False gives every sequence its own copy of the prompt.
    Raises:
        ValueError: there is no group.
    """
    if not groups:
        raise ValueError("groups must hold at least one group, got none")
    batch = _BatchBuilder()
    tokens: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    segments: list[tuple[int, int, int, int]] = []
    end = 0  # T so far

    def append_branch(ids: np.ndarray, first_position: int, prefix: tuple[int, int]) -> int:
        nonlocal end
        start, end = end, end + len(ids)
        tokens.append(ids)
        positions.append(np.arange(first_position, first_position + len(ids)))
        segments.append((start, end, *prefix))
        return start

    for group in groups:
        batch.add_group(group)
        sequences = _sequences(group)
        num_shared = _common_prefix_length(sequences) if prefix_sharing and len(sequences) > 1 else 0
        # rows of the tokens that sequences share; a token counts once here, however many sequences count it
        counted_somewhere = np.any([s.is_counted[:num_shared] for s in sequences], axis=0)
        shared = np.flatnonzero(counted_somewhere)
        row_of_shared = np.full(num_shared, -1)
        prefix_start = end
        row_of_shared[shared] = batch.add_rows(prefix_start + shared - 1, sequences[0].tokens[shared])
        for k, sequence in enumerate(sequences):
            is_first = k == 0 or num_shared == 0
            if is_first:
                offset = append_branch(sequence.tokens, 0, (0, 0))
            else:
                prefix = (prefix_start, prefix_start + num_shared)
                offset = append_branch(sequence.tokens[num_shared:], num_shared, prefix) - num_shared
            own = num_shared + np.flatnonzero(sequence.is_counted[num_shared:])
            predicted_from = offset + own - 1
            if not is_first:  # a branch's first token is predicted from the prefix's last one
                predicted_from[own == num_shared] = prefix_start + num_shared - 1
            own_rows = batch.add_rows(predicted_from, sequence.tokens[own])
            shared_rows = row_of_shared[sequence.is_counted[:num_shared]]
            batch.add_sequence(np.concatenate([shared_rows, own_rows]), len(sequence.tokens))
        batch.end_group()

    layout = {"segments": tuple(segments), "varlen": varlen_layout(segments)}
    return batch.build(_concatenate(tokens)[None], _concatenate(positions)[None], **layout)


def pad_pairs(groups: Sequence[TokenizedGroup], *, pad_token_id: int = 0) -> PackedBatch:
    """Lays every sequence out in a right-padded row of its own, for models whose attention cannot be packed.

    Raises:
        ValueError: there is no group.
    """
    if not groups:
        raise ValueError("groups must hold at least one group, got none")
    sequences_of_groups = [_sequences(group) for group in groups]
    width = max(len(s.tokens) for sequences in sequences_of_groups for s in sequences)
    batch = _BatchBuilder()
    rows: list[np.ndarray] = []  # of input_ids
    masks: list[np.ndarray] = []
    for group, sequences in zip(groups, sequences_of_groups, strict=True):
        batch.add_group(group)
        for sequence in sequences:
            num_padding = width - len(sequence.tokens)
            counted = np.flatnonzero(sequence.is_counted)
            predicted_from = len(rows) * width + counted - 1
            batch.add_sequence(batch.add_rows(predicted_from, sequence.tokens[counted]), len(sequence.tokens))
            rows.append(np.pad(sequence.tokens, (0, num_padding), constant_values=pad_token_id))
            masks.append(np.pad(np.ones_like(sequence.tokens), (0, num_padding)))
        batch.end_group()
    return batch.build(
        torch.from_numpy(np.stack(rows)),
        torch.arange(width).expand(len(rows), width),
        attention_mask=torch.from_numpy(np.stack(masks)),
    )
