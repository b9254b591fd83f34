"""Groups of token ids in, one PackedBatch out: packed without padding and with shared prefixes, or padded for models
that cannot run packed rows.

Two pairs, prompts [1 2] and [6], responses [3 4] / [5] and [7] / [8 9]:

    input_ids     1 2 3 4 | 5 | 6 7 | 8 9     prompt + chosen, then the rejected branch, for each pair
    position_ids  0 1 2 3 | 2 | 0 1 | 1 2     a branch continues from its prefix's end
    segments      (0,4, 0,0) (4,5, 0,2) (5,7, 0,0) (7,9, 5,6)     queries 4..5 also see the keys of rows 0..2
    labels        3 4 5 7 8 9
    logit_rows    1 2 1 5 5 7                 row 1, the prompt's end, predicts both 3 and 5
    cu_seqlens    0 2 3 4 6                   token_rows is 0 1 2 3 4 5 here: no response token is shared
    group_ends    (3, 3, 2, 1) (6, 6, 4, 2)   rows, tokens, sequences and pairs up to the end of each group
    example_ids   0 0 1 1                     dataset row of each sequence, counted within the batch
    uses          2 2 1 1 1 2 1 1 1           how many pair sides each position belongs to

The first sequence of a group is computed whole. Every other sequence that differs is a branch: it shares the longest
common prefix with the first one, response tokens included, and keeps at least one token of its own. Equal sequences
share one branch, but remain separate sequences, so each keeps its own loss mask and reference log-prob.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fastdpo.data.batches.layout import GroupLayout, counted_sequences, lay_out
from fastdpo.data.batches.varlen import varlen_layout
from fastdpo.types import PackedBatch, TokenizedGroup

SHARED_PARTS_AFTER = 2  # with ld_alpha, the shared part of sequence i is sequence i + 2 (`data/rows/loss_rows.py`)


class _BatchBuilder:
    """The part shared by packed and padded layouts: pairs, labels, and which row predicts which label."""

    def __init__(self, *, shared_parts: bool) -> None:
        self.brings_shared_parts = shared_parts
        self.pairs: list[tuple[int, int]] = []
        self.logit_rows: list[np.ndarray] = []
        self.labels: list[np.ndarray] = []
        self.token_rows: list[np.ndarray] = []
        self.num_rows = 0  # R so far
        self.num_tokens = 0
        self.num_counted = 0  # N so far
        self.group_ends: list[tuple[int, int, int, int]] = []
        self.ref_logps: list[float] | None = []
        self.example_ids: list[int] = []

    def add_rows(self, logit_rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Appends rows for the LM head and returns their indices r."""
        self.logit_rows.append(logit_rows)
        self.labels.append(labels)
        self.num_rows += len(labels)
        return np.arange(self.num_rows - len(labels), self.num_rows)

    def add_sequence(self, token_rows: np.ndarray, num_tokens: int) -> None:
        self.token_rows.append(token_rows)
        self.num_counted += len(token_rows)
        self.num_tokens += num_tokens

    def add_group(self, group: TokenizedGroup, example_ids: Sequence[int]) -> None:
        self.example_ids.extend(example_ids)
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
        pairs = torch.tensor(self.pairs, dtype=torch.int64).reshape(-1, 2)
        return PackedBatch(
            pairs=pairs,
            input_ids=input_ids,
            position_ids=position_ids,
            logit_rows=_concatenate(self.logit_rows),
            labels=_concatenate(self.labels),
            token_rows=_concatenate(self.token_rows),
            cu_seqlens=torch.tensor(lengths, dtype=torch.int64).cumsum(0),
            num_tokens=self.num_tokens,
            group_ends=tuple(self.group_ends),
            example_ids=torch.tensor(self.example_ids, dtype=torch.int64),
            ref_logps=torch.tensor(self.ref_logps, dtype=torch.float32) if self.ref_logps else None,
            shared_parts=self._shared_parts(pairs) if self.brings_shared_parts else None,
            **layout,
        )

    def _shared_parts(self, pairs: torch.Tensor) -> torch.Tensor:
        """(B, 2): the sequences that hold the shared parts of each pair.

        Raises:
            ValueError: a row has other responses there, or none.
        """
        labels = _concatenate(self.labels).numpy()
        counted = [labels[rows] for rows in self.token_rows]
        for pair in self.pairs:
            num_shared = min(len(counted[side]) for side in pair)
            for side in pair:
                part = side + SHARED_PARTS_AFTER
                if part >= len(counted) or not np.array_equal(counted[part], counted[side][:num_shared]):
                    raise ValueError(
                        "ld_alpha must be None for these rows: they lack the responses up to the length that each pair"
                        " shares"
                    )
        return pairs + SHARED_PARTS_AFTER


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
    return pack_layouts(
        [lay_out(g, (i,) * len(g.responses), prefix_sharing=prefix_sharing) for i, g in enumerate(groups)]
    )


def pack_layouts(
    layouts: Sequence[GroupLayout], *, pad_token_id: int = 0, multiple_of: int = 1, shared_parts: bool = False
) -> PackedBatch:
    """The groups of `layouts` in one row.

    Args:
        shared_parts: groups hold the shared parts of their pairs, see `with_shared_parts`.
        multiple_of: pads the row's length to a multiple of this many tokens. The padding is a separate branch at the
            end, which no other token attends to.
    Raises:
        ValueError: there is no group, or it lacks the shared parts of its pairs.
    """
    if not layouts:
        raise ValueError("groups must hold at least one group, got none")
    batch = _BatchBuilder(shared_parts=shared_parts)
    tokens: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    segments: list[tuple[int, int, int, int]] = []
    uses: list[np.ndarray] = []
    end = 0  # T so far
    for layout in layouts:
        batch.add_group(layout.group, layout.example_ids)
        uses.append(_uses_of_positions(layout))
        first_start = end
        rows_of: list[np.ndarray] = []  # per branch, the head row of each of its tokens; -1 where none is needed
        for branch in layout.branches:
            shared, length = branch.num_shared, len(branch.tokens)
            start, end = end, end + length - shared
            tokens.append(branch.tokens[shared:])
            positions.append(np.arange(shared, length))
            segments.append((start, end, first_start, first_start + shared) if shared else (start, end, 0, 0))
            needed = shared + np.flatnonzero(branch.is_counted[shared:])
            predicted_from = needed + (start - shared - 1)
            if shared:  # the branch's first token is predicted from the prefix's last one
                predicted_from[needed == shared] = first_start + shared - 1
            rows = np.full(length, -1)
            if shared:
                rows[:shared] = rows_of[0][:shared]
            rows[needed] = batch.add_rows(predicted_from, branch.tokens[needed])
            rows_of.append(rows)
        for sequence, index, num_uses in zip(layout.sequences, layout.branch_of, _uses(layout.group), strict=True):
            batch.add_sequence(rows_of[index][sequence.is_counted], len(sequence.tokens) if num_uses else 0)
        batch.end_group()
    if num_padding := -end % multiple_of:
        tokens.append(np.full(num_padding, pad_token_id))
        positions.append(np.arange(num_padding))
        segments.append((end, end + num_padding, 0, 0))
        uses.append(np.zeros(num_padding))
    packed = {"segments": tuple(segments), "varlen": varlen_layout(segments), "uses": _concatenate(uses)[None]}
    return batch.build(_concatenate(tokens)[None], _concatenate(positions)[None], **packed)


def _uses(group: TokenizedGroup) -> np.ndarray:
    """(K,) int64: number of pair sides that each response takes; 1 if the group has no pairs."""
    if not group.preferences:
        return np.ones(len(group.responses), dtype=np.int64)
    return np.bincount(np.asarray(group.preferences).ravel(), minlength=len(group.responses))


def _uses_of_positions(layout: GroupLayout) -> np.ndarray:
    """Number of pair sides that each position of the packed group belongs to."""
    per_branch = np.bincount(layout.branch_of, weights=_uses(layout.group))
    parts = [np.full(len(b.tokens) - b.num_shared, n) for b, n in zip(layout.branches, per_branch, strict=True)]
    for branch, num_uses in zip(layout.branches[1:], per_branch[1:], strict=True):
        parts[0][: branch.num_shared] += num_uses
    return np.concatenate(parts)


def pad_pairs(
    groups: Sequence[TokenizedGroup],
    *,
    pad_token_id: int = 0,
    multiple_of: int = 1,
    example_ids: Sequence[int] | None = None,
    shared_parts: bool = False,
) -> PackedBatch:
    """Lays sequences out in right-padded rows, for models that cannot run packed rows; equal sequences share a row.

    Args:
        shared_parts: groups hold the shared parts of their pairs, see `with_shared_parts`.
        multiple_of: pads the rows' length to a multiple of this many tokens.
        example_ids: the example of the batch that each group comes from; by default 0, 1, 2, ...
    Raises:
        ValueError: there is no group, or it lacks the shared parts of its pairs.
    """
    if not groups:
        raise ValueError("groups must hold at least one group, got none")
    sequences_of_groups = [counted_sequences(group) for group in groups]
    width = max(len(s.tokens) for sequences in sequences_of_groups for s in sequences)
    width += -width % multiple_of
    batch = _BatchBuilder(shared_parts=shared_parts)
    rows: list[np.ndarray] = []  # of input_ids
    masks: list[np.ndarray] = []
    uses: list[np.ndarray] = []
    example_ids = range(len(groups)) if example_ids is None else example_ids
    for example, group, sequences in zip(example_ids, groups, sequences_of_groups, strict=True):
        batch.add_group(group, [example] * len(sequences))
        places: dict[bytes, tuple[int, np.ndarray]] = {}  # of equal tokens: their row, and the head row of each token
        for sequence, num_uses in zip(sequences, _uses(group), strict=True):
            tokens = sequence.tokens
            if tokens.tobytes() not in places:
                places[tokens.tobytes()] = (len(rows), np.full(len(tokens), -1))
                num_padding = width - len(tokens)
                rows.append(np.pad(tokens, (0, num_padding), constant_values=pad_token_id))
                masks.append(np.pad(np.ones_like(tokens), (0, num_padding)))
                uses.append(np.zeros_like(masks[-1]))
            row, head_rows = places[tokens.tobytes()]
            uses[row] += num_uses * masks[row]
            needed = np.flatnonzero(sequence.is_counted & (head_rows < 0))
            head_rows[needed] = batch.add_rows(row * width + needed - 1, tokens[needed])
            batch.add_sequence(head_rows[sequence.is_counted], len(tokens) if num_uses else 0)
        batch.end_group()
    return batch.build(
        torch.from_numpy(np.stack(rows)),
        torch.arange(width).expand(len(rows), width),
        attention_mask=torch.from_numpy(np.stack(masks)),
        uses=torch.from_numpy(np.stack(uses)),
    )
