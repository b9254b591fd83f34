"""Micro-batches that do not fit into memory: halved and tried again, until they hold one row.

In: a micro-batch and the rows that it was made of. Out: two micro-batches of the same rows. The size that did not fit
is remembered: later micro-batches of at least as many tokens are halved before they run. A row that does not fit alone
is refused with its number and length, or left out and counted if on_oversized_row is "skip"; it then counts as a loss
of 0 in the mean of its step.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from transformers.utils import logging

from fastdpo.data.prepare import group_from_columns
from fastdpo.training.inputs.collator import Example, PackingCollator
from fastdpo.training.inputs.transfer import OneBuffer

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Piece:
    """A micro-batch on the device, and the rows that it was made of; None if the collator does not tell them."""

    inputs: dict[str, Any]
    examples: tuple[Example, ...] | None

    @property
    def num_tokens(self) -> int:
        return int(self.inputs["input_ids"].numel())


@dataclass
class OutOfMemory:
    """What has not fitted so far."""

    collator: PackingCollator
    on_oversized_row: str
    cannot_split: str = ""  # why micro-batches of this run must stay whole; empty if they need not
    least: int | None = None  # tokens of the smallest micro-batch of several rows that did not fit
    skipped: list[int] = field(default_factory=list)  # numbers of the rows that were left out, -1 if unknown

    def fitting(self, piece: Piece) -> list[Piece]:
        """The micro-batch in parts that are smaller than what did not fit; itself as long as everything fits."""
        is_small = self.least is None or piece.num_tokens < self.least
        if is_small or self.cannot_split or piece.examples is None or len(piece.examples) < 2:
            return [piece]
        return [part for half in self._halved(piece) for part in self.fitting(half)]

    def after(self, piece: Piece, reason: str, dataset: Any, name: str) -> list[Piece]:
        """What to run instead of a micro-batch that has not fitted; nothing if its only row is left out.

        Raises:
            ValueError: it cannot be split, or its only row does not fit.
        """
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        tokens = piece.num_tokens
        if self.cannot_split or piece.examples is None:
            why = self.cannot_split or "the data_collator does not say which rows a batch holds"
            raise ValueError(
                f"per_device_train_batch_size must be smaller: a batch of {tokens:,} tokens does not fit into memory,"
                f" and it cannot be halved, because {why} ({reason})"
            )
        if len(piece.examples) < 2:
            return self._without(piece, reason, dataset, name)
        if self.least is None or tokens < self.least:
            self.least = tokens
            logger.warning(
                f"A micro-batch of {tokens:,} tokens does not fit into memory. It is halved, and so are later ones of"
                " that size; gradients stay those of the whole batch. To save the failed attempts, set"
                f" max_tokens_per_microbatch={max(tokens // 2, 1)}"
            )
        return self._halved(piece)

    def _without(self, piece: Piece, reason: str, dataset: Any, name: str) -> list[Piece]:
        assert piece.examples is not None
        row = row_of(dataset, piece.examples[0])
        which = (
            f"row {row} of the prepared {name} dataset (counted from 0)" if row >= 0 else f"a row of the {name} data"
        )
        found = f"{which} has {piece.num_tokens:,} tokens and does not fit into memory by itself"
        if self.on_oversized_row != "skip":
            raise ValueError(
                f"max_length must be smaller: {found} ({reason}). Turn on gradient_checkpointing, or leave such rows"
                " out with on_oversized_row='skip'"
            )
        if row < 0 or row not in self.skipped:
            self.skipped.append(row)
            logger.warning(f"Left out: {found}. {len(self.skipped)} rows so far")
        return []

    def _halved(self, piece: Piece) -> list[Piece]:
        """Two micro-batches of about half the tokens each."""
        assert piece.examples is not None
        sizes = [self.collator.num_tokens(group) for _, group in piece.examples]
        cut, sum_so_far = 1, sizes[0]
        while cut < len(sizes) - 1 and sum_so_far + sizes[cut] <= sum(sizes) / 2:
            sum_so_far += sizes[cut]
            cut += 1
        return [self._of(piece, piece.examples[:cut]), self._of(piece, piece.examples[cut:])]

    def _of(self, piece: Piece, examples: Sequence[Example]) -> Piece:
        inputs = self.collator.batch_of(examples).asdict()
        inputs["mean_chosen_length"] = piece.inputs.get("mean_chosen_length")
        return Piece(dict(OneBuffer(inputs).to(piece.inputs["input_ids"].device)), tuple(examples))


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocation has failed: on a GPU, or on the CPU, whose error has no type of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def row_of(dataset: Any, example: Example) -> int:
    """The number of the row in a prepared dataset, -1 if it is not found; a stream cannot be searched."""
    if not isinstance(dataset, Dataset):
        return -1
    prompt, responses = list(example[1].prompt_ids), [list(response) for response in example[1].responses]
    for number, row in enumerate(dataset):
        group = group_from_columns(row)
        if list(group.prompt_ids) == prompt and [list(response) for response in group.responses] == responses:
            return number
    return -1
