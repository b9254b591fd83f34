"""Rows of token columns in, one packed or padded batch out, as the dict of tensors that Trainer moves to the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastdpo.data.packing import pack_pairs, pad_pairs
from fastdpo.data.prepare import group_from_columns


@dataclass
class PackingCollator:
    """`PackedBatch(**collator(rows))` is the batch."""

    is_packed: bool = True
    prefix_sharing: bool = True
    pad_token_id: int = 0  # padded batches only

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        groups = [group_from_columns(row) for row in rows]
        if self.is_packed:
            return pack_pairs(groups, prefix_sharing=self.prefix_sharing).asdict()
        return pad_pairs(groups, pad_token_id=self.pad_token_id).asdict()
