"""Rows of token columns in, one packed or padded batch out, as the dict of tensors that Trainer moves to the device.

If micro-batches have a token limit, a larger batch becomes a dict of several: their common values under the keys that
Trainer reads, and each micro-batch under `microbatches`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from fastdpo.data.batches.microbatches import lay_out_batch, num_padded_rows, packed_microbatches, padded_microbatches
from fastdpo.data.batches.packing import pack_layouts, pad_pairs
from fastdpo.data.batches.shares import with_shares
from fastdpo.data.prepare import group_from_columns
from fastdpo.data.tokens.tokenization import padding_id
from fastdpo.training.inputs.transfer import OneBuffer
from fastdpo.training.settings.engine import EngineConfig
from fastdpo.types import PackedBatch, TokenizedGroup

Example = tuple[int, TokenizedGroup]  # the number of a row in its batch, and the row


@dataclass
class PackingCollator:
    """`[PackedBatch(**inputs) for inputs in microbatches_of(collator(rows))]` are the batches."""

    is_packed: bool = True
    prefix_sharing: bool = True
    pad_token_id: int = 0
    pad_to_multiple_of: int | None = None  # tokens of a row; the added padding is not counted in max_tokens
    max_tokens: int | None = None  # of a micro-batch, as it runs: shared prefixes once, padding too; None for no limit
    shared_parts: bool = False  # rows hold the shared parts of their pairs, as ld_alpha needs them
    num_shares: int = 1  # processes that compute a packed row together

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        groups = [group_from_columns(row) for row in rows]
        packed = self._packed(groups) if self.is_packed else self._padded(groups)
        batches = [batch.asdict() for batch in packed]
        if len(batches) == 1:
            collated = OneBuffer(batches[0])
        else:
            collated = OneBuffer(
                {
                    "pairs": torch.cat([batch["pairs"] for batch in batches]),  # first: Trainer reads the size there
                    "input_ids": torch.cat([batch["input_ids"].reshape(1, -1) for batch in batches], dim=1),
                    "microbatches": tuple(batches),
                }
            )
        collated.examples = tuple(
            tuple((i, groups[i]) for i in sorted(set(batch.example_ids.tolist())))  # type: ignore[union-attr]
            for batch in packed
        )
        return collated

    def batch_of(self, examples: Sequence[Example]) -> PackedBatch:
        """One batch of these rows, whatever its size."""
        whole = replace(self, max_tokens=None)
        groups = [group for _, group in examples]
        (batch,) = whole._packed(groups) if self.is_packed else whole._padded(groups)
        numbers = torch.tensor([number for number, _ in examples])
        return replace(batch, example_ids=numbers[batch.example_ids])

    def num_tokens(self, group: TokenizedGroup) -> int:
        """Number of tokens that a group takes in a micro-batch by itself."""
        if self.is_packed:
            return sum(layout.num_tokens for layout in lay_out_batch([group], prefix_sharing=self.prefix_sharing))
        return num_padded_rows(group) * (len(group.prompt_ids) + max(map(len, group.responses)))

    def _packed(self, groups: Sequence[TokenizedGroup]) -> list[PackedBatch]:
        layouts = lay_out_batch(groups, prefix_sharing=self.prefix_sharing, max_tokens=self.max_tokens)
        parts = [layouts] if self.max_tokens is None else packed_microbatches(layouts, self.max_tokens)
        return [with_shares(pack_layouts(some, **self._options()), self.num_shares) for some in parts]

    def _padded(self, groups: Sequence[TokenizedGroup]) -> list[PackedBatch]:
        if self.max_tokens is None:
            return [pad_pairs(groups, **self._options())]
        return [
            pad_pairs([groups[i] for i in items], example_ids=items, **self._options())
            for items in padded_microbatches(groups, self.max_tokens)
        ]

    def _options(self) -> dict[str, Any]:
        return {
            "pad_token_id": self.pad_token_id,
            "multiple_of": math.lcm(self.pad_to_multiple_of or 1, self.num_shares),
            "shared_parts": self.shared_parts,
        }


def collator_for(args: EngineConfig, tokenizer: PreTrainedTokenizerBase) -> PackingCollator:
    """The collator of a run, which packs unless it is told otherwise."""
    multiple, budget = args.pad_to_multiple_of, args.max_tokens_per_microbatch
    return PackingCollator(
        prefix_sharing=args.prefix_sharing,
        pad_token_id=padding_id(tokenizer),
        pad_to_multiple_of=multiple if isinstance(multiple, int) else None,
        max_tokens=budget if isinstance(budget, int) else None,
        shared_parts=getattr(args, "ld_alpha", None) is not None,
        num_shares=args.sequence_parallel_size,
    )


def examples_of(inputs: dict[str, Any]) -> list[tuple[Example, ...] | None]:
    """The rows of each micro-batch in a collated batch; None where the collator has not told them."""
    parts, known = microbatches_of(inputs), getattr(inputs, "examples", None)
    return list(known) if known is not None and len(known) == len(parts) else [None] * len(parts)


def microbatches_of(inputs: dict[str, Any]) -> list[dict[str, Any]]:
    """The dicts of the micro-batches in a collated batch, or the batch itself."""
    return list(inputs.get("microbatches", (inputs,)))
