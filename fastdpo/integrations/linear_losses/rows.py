"""The positions of a batch that reach the LM head, ordered by groups whose losses depend on nothing else.

In: labels of sequences, group by group. Out: the rows of the head and the tokens that use them. Refuses nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastdpo.ops.sequence_loss import GroupEnd
from fastdpo.types import IGNORE_INDEX


class Rows(NamedTuple):
    """T rows of the head, and the N tokens of the sequences that use them."""

    labels: Tensor  # (T,)
    positions: Tensor  # (T,) of the rows in the flat batch of hidden states
    cu_seqlens: Tensor  # (G * S + 1,)
    token_rows: Tensor | None  # (N,) the row of each token; None: token n uses row n
    group_ends: list[GroupEnd]

    @classmethod
    def of(cls, labels: Tensor, positions: Tensor) -> Rows:
        """The positions of G groups of S sequences, (G, S, L), whose label is not IGNORE_INDEX.

        A group's third sequence stands at the positions of its first; a token with the first's label uses its row:

            labels of one group [[-, a, b], [-, c, d], [p, a, b]]  ->  rows a b c d p, tokens a b | c d | p a b

        Counting rows synchronizes with the GPU. Under torch.compile all positions are rows, so that shapes do not
        depend on values.
        """
        num_groups, width, length = labels.shape
        if torch.compiler.is_compiling():
            size = width * length
            ends = [GroupEnd(i * size, i * size, i * width) for i in range(1, num_groups + 1)]
            cu_seqlens = torch.arange(num_groups * width + 1, device=labels.device) * length
            return cls(labels.flatten(), positions.flatten(), cu_seqlens, None, ends)
        is_token = labels != IGNORE_INDEX
        is_row = is_token.clone()
        is_row[:, 2:] &= labels[:, 2:] != labels[:, :1]
        rows = (is_row.flatten().cumsum(0) - 1).view_as(labels)
        rows[:, 2:] = rows[:, 2:].where(is_row[:, 2:], rows[:, :1])
        counts = torch.stack([is_row.sum((1, 2)), is_token.sum((1, 2))]).cumsum(1).tolist()
        ends = [GroupEnd(row, token, width * (i + 1)) for i, (row, token) in enumerate(zip(*counts, strict=True))]
        cu_seqlens = torch.nn.functional.pad(is_token.sum(2).flatten().cumsum(0), (1, 0))
        return cls(labels[is_row], positions[is_row], cu_seqlens, rows[is_token] if width > 2 else None, ends)

    def take(self, hidden: Tensor) -> Tensor:
        """(T, H) rows of (B, L, H) hidden states."""
        return hidden.flatten(0, 1).index_select(0, self.positions)


def places_of(labels: Tensor) -> Tensor:
    """The place of each label in the flat batch, in the shape of the labels."""
    return torch.arange(labels.numel(), device=labels.device).view_as(labels)
