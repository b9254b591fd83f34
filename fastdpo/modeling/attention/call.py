"""The input of backends: one attention call of one layer over a packed row, and the layout that all layers share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdpo.modeling.attention.prefix import Prefix
from fastdpo.modeling.sequence_group import SequenceGroup
from fastdpo.types import VarlenLayout


class UnsupportedAttention(ValueError):
    """No allowed backend can run a call."""


@dataclass(frozen=True)
class AttentionCall:
    """T rows, D the head dim of queries and keys, E that of values. Backends return (1, T, num_heads, E).

    Keys and values of a row that continues a prefix of P tokens are those of the prefix, then its own: P + T.
    """

    query: Tensor  # (1, num_heads, T, D)
    key: Tensor  # (1, num_kv_heads, P + T, D)
    value: Tensor  # (1, num_kv_heads, P + T, E)
    layout: PackedLayout
    dropout: float  # probability that a weight is dropped
    scale: float  # factor on the logits
    window: int | None  # tokens a query sees, itself included; None where no branch is longer
    softcap: float | None  # logits become `softcap * tanh(logits / softcap)`
    sinks: Tensor | None  # (num_heads,) one more logit a row, which takes probability and gives no value
    chunk: int | None = None  # tokens see those of their own chunk of so many positions; None where no branch is longer

    @property
    def is_grouped(self) -> bool:
        return self.query.shape[1] != self.key.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return attention_dtype(self.query)


def attention_dtype(query: Tensor) -> torch.dtype:
    """The dtype in which scaled_dot_product_attention computes: autocast's dtype if autocast is on."""
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type) and query.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return query.dtype


class PackedLayout:
    """The branches of one packed row, with the masks that its layers share. Built once per forward.

    Args:
        segments: per branch query start, query end, prefix start, prefix end, on the host. Those of a row with a prefix
            count its tokens too: the first branch starts at P and has the prefix 0, P.
        varlen: the same as index tensors on the row's device.
        backend: name of an attention backend, or "auto"; see `backends.py`.
        excluded: backends that "auto" and "flash" must not use, with reasons.
        masks: kind of mask for models that ask for one, see `masks.py`.
        group: the processes that hold the row in parts; None if this process holds it whole.
        prefix: the tokens before the row, which ran before; None if the row starts with its first token.
        record: takes the keys and values of the row.
    """

    def __init__(
        self,
        segments: Sequence[tuple[int, int, int, int]],
        varlen: VarlenLayout,
        backend: str = "auto",
        excluded: Mapping[str, str] | None = None,
        masks: str = "none",
        group: SequenceGroup | None = None,
        prefix: Prefix | None = None,
        record: Prefix | None = None,
    ) -> None:
        self.segments = segments
        self.varlen = varlen
        self.backend = backend
        self.excluded = excluded or {}
        self.masks = masks
        self.group = group
        self.prefix = prefix
        self.record = record
        self._branch_masks: dict[tuple[Any, ...], Tensor] = {}
        self._row_masks: dict[tuple[int | None, int | None], Tensor] = {}
        self._positions: Tensor | None = None

    @property
    def num_before(self) -> int:
        """P, the tokens before the row."""
        return 0 if self.prefix is None else self.prefix.num_tokens

    def continued(self, module: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's keys and values of the prefix and of the row, which are recorded if they are to be."""
        if self.record is not None:
            self.record.add(module, key, value)
        return (key, value) if self.prefix is None else self.prefix.before(module, key, value)

    def positions(self) -> Tensor:
        """(T,) position of each row within its prefix and branch."""
        if self._positions is None:
            varlen = self.varlen
            row = torch.arange(len(varlen.row_ends) - 1, device=varlen.row_ends.device)
            branch = torch.bucketize(row, varlen.cu_queries[1:].long(), right=True)
            prefix_lengths = varlen.cu_keys.diff().long() - varlen.cu_queries.diff().long()
            self._positions = prefix_lengths[branch] + row - varlen.cu_queries[:-1].long()[branch]
        return self._positions

    def own_positions(self) -> Tensor:
        """The positions of the rows that this process holds."""
        positions = self.positions()
        return positions if self.group is None else positions[self.group.share(len(positions))]

    def branch_mask(
        self, num_queries: int, num_keys: int, window: int | None, device: torch.device, chunk: int | None = None
    ) -> Tensor:
        """(num_queries, num_keys) bool, True where query i may see key j: the last query sees the last key.

        `window` counts the visible tokens including the query itself, as `sliding_window` does in model configs.
        """
        name = (num_queries, num_keys, window, chunk, device)
        if name not in self._branch_masks:
            query = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
            key = torch.arange(num_keys, device=device)[None, :]
            self._branch_masks[name] = _limited(query >= key, query, key, window, chunk)
        return self._branch_masks[name]

    def row_mask(self, window: int | None, chunk: int | None = None) -> Tensor:
        """(T, T) bool on the row's device, True where row i may see row j. Made without device synchronization."""
        if (window, chunk) not in self._row_masks:
            varlen = self.varlen
            row = torch.arange(len(varlen.row_ends) - 1, device=varlen.row_ends.device)
            branch = torch.bucketize(row, varlen.cu_queries[1:].long(), right=True)  # of each row
            own_start = varlen.cu_queries[:-1].long()[branch]
            prefix_lengths = varlen.cu_keys.diff().long() - varlen.cu_queries.diff().long()
            prefix_start = varlen.key_rows[varlen.cu_keys[:-1].long()][branch]  # the branch's own where it has none
            prefix_length = prefix_lengths[branch]
            position = prefix_length + row - own_start  # within prefix and branch
            in_own = (row >= own_start[:, None]) & (row <= row[:, None])
            in_prefix = (row >= prefix_start[:, None]) & (row < (prefix_start + prefix_length)[:, None])
            # a prefix is the start of its own branch, so that its positions are the query's
            visible = _limited(in_own | in_prefix, position[:, None], position, window, chunk)
            self._row_masks[window, chunk] = visible
        return self._row_masks[window, chunk]

    def bias(self, window: int | None, chunk: int | None, dtype: torch.dtype) -> Tensor:
        """(T, T) `row_mask` as a bias on logits: 0 where visible, the lowest number of the dtype elsewhere."""
        visible = self.row_mask(window, chunk)
        zeros = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        return zeros.masked_fill(~visible, torch.finfo(dtype).min)


def _limited(visible: Tensor, query: Tensor, key: Tensor, window: int | None, chunk: int | None) -> Tensor:
    """The visible positions within a window and within chunks."""
    if window is not None:
        visible = visible & (query - key < window)
    if chunk is not None:
        visible = visible & (query // chunk == key // chunk)
    return visible
