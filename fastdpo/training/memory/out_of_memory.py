"""Micro-batches that do not fit into memory: halved and tried again, until they hold one row.

In: a micro-batch and the rows that it was made of. Out: two micro-batches of the same rows. The size that did not fit
is remembered: later micro-batches of at least as many tokens are halved before they run. A row that does not fit alone
is refused with its number and length, or left out and counted if on_oversized_row is "skip"; it then counts as a loss
of 0 in the mean of its step. If on_oversized_row is "split", the row runs in parts (`row_parts.py`), down to one
sequence; first as one micro-batch whose prompt runs once, and if that does not fit, part by part.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from transformers.utils import logging

from fastdpo.data.prepare import group_from_columns
from fastdpo.training.inputs.collator import Example, PackingCollator
from fastdpo.training.inputs.transfer import OneBuffer
from fastdpo.training.memory.row_parts import (
    IN_PARTS,
    KNOWN,
    KnownWeights,
    RowInParts,
    RowPart,
    halves_of_part,
    parts_of_row,
    repeats_much,
)

logger = logging.get_logger(__name__)


# the inputs without the items of rows that other processes have, too
OwnItems = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Piece:
    """A micro-batch on the device, and the rows that it was made of; None if the collator does not tell them."""

    inputs: dict[str, Any]
    examples: tuple[Example, ...] | None
    part: RowPart | None = None  # what it holds, if that is only a part of one row
    own_items: OwnItems | None = None  # if other processes have some of its rows, too
    pieces: tuple[Piece, ...] = ()  # the parts of a row whose prompt runs once for them

    @classmethod
    def of_part(cls, part: RowPart, known: KnownWeights | None) -> Piece:
        return cls({**part.inputs, KNOWN: known}, ((part.row[0], part.group),), part)

    @classmethod
    def of_parts(cls, pieces: Sequence[Piece]) -> Piece:
        """The parts of a row, each with its known weights, as one micro-batch."""
        parts = [piece.part for piece in pieces if piece.part is not None]
        in_parts = RowInParts(parts, [piece.inputs[KNOWN] for piece in pieces])
        return cls({IN_PARTS: in_parts}, (parts[0].row,), pieces=tuple(pieces))

    @property
    def num_tokens(self) -> int:
        """The tokens that run at once."""
        if self.pieces:
            return max(piece.num_tokens for piece in self.pieces)
        return int(self.inputs["input_ids"].numel())


@dataclass
class OutOfMemory:
    """What has not fitted so far."""

    collator: PackingCollator
    on_oversized_row: str
    cannot_split: str = ""  # why micro-batches of this run must stay whole; empty if they need not
    repeats_prompt: str = ""  # why a prompt of this run must run once for every part of its row; empty if it need not
    least: int | None = None  # tokens of the smallest micro-batch of several rows that did not fit
    least_of_row: int | None = None  # tokens of the smallest row or part of a row that did not fit
    least_prompt: int | None = None  # tokens of the shortest prompt that did not fit beside the parts of its row
    skipped: list[int] = field(default_factory=list)  # numbers of the rows that were left out, -1 if unknown

    def fitting(self, piece: Piece) -> list[Piece]:
        """The micro-batch in parts that are smaller than what did not fit; itself as long as everything fits."""
        is_small = self.least is None or piece.num_tokens < self.least
        if is_small or self.cannot_split or piece.examples is None or len(piece.examples) < 2:
            return [piece]
        return [part for half in self._halved(piece) for part in self.fitting(half)]

    def parts(self, piece: Piece) -> list[RowPart]:
        """The parts in which a row must run; none if it may run whole."""
        is_row = piece.examples is not None and len(piece.examples) == 1 and piece.part is None and not piece.pieces
        if self.on_oversized_row != "split" or not is_row:
            return []
        assert piece.examples is not None
        row, limit = piece.examples[0], self.collator.max_tokens
        capacities = [limit] if limit is not None and piece.num_tokens > limit else []
        if self.least_of_row is not None and piece.num_tokens >= self.least_of_row:
            capacities.append(self.least_of_row // 2)
        if not capacities or len(row[1].responses) < 2:
            return []
        return parts_of_row(row, self.collator, min(capacities), piece.inputs["input_ids"])

    def shared_prompt(self, parts: Sequence[RowPart]) -> int:
        """Tokens of the prompt of a row's parts that runs once for them; 0 if it cannot, or if that saves little."""
        num_prompt = len(parts[0].group.prompt_ids)
        fits = self.least_prompt is None or num_prompt < self.least_prompt
        return num_prompt if not self.repeats_prompt and fits and repeats_much(parts) else 0

    def repeat_prompt(self, num_prompt: int, reason: str) -> None:
        """From now on, prompts of so many tokens run with every part of their row."""
        _release()
        self.least_prompt = num_prompt
        logger.warning(
            f"A prompt of {num_prompt:,} tokens cannot run once for all parts of its row ({reason}). Prompts of that"
            " length run with every part; gradients stay those of the whole row"
        )

    def after(self, piece: Piece, reason: str, dataset: Any, name: str) -> list[Piece]:
        """What to run instead of a micro-batch that has not fitted; nothing if its only row is left out. A row that is
        returned as it was will run in parts.

        Raises:
            ValueError: it cannot be split, or its only row does not fit.
        """
        if piece.pieces:
            assert piece.examples is not None
            self.repeat_prompt(len(piece.examples[0][1].prompt_ids), reason)
            return list(piece.pieces)
        _release()
        tokens = piece.num_tokens
        if self.cannot_split or piece.examples is None:
            why = self.cannot_split or "the data_collator does not say which rows a batch holds"
            raise ValueError(
                f"per_device_train_batch_size must be smaller: a batch of {tokens:,} tokens does not fit into memory,"
                f" and it cannot be halved, because {why} ({reason})"
            )
        if len(piece.examples) < 2:
            if self.on_oversized_row == "split" and len(piece.examples[0][1].responses) > 1:
                return self._in_parts(piece)
            return self._without(piece, reason, dataset, name)
        if self.least is None or tokens < self.least:
            self.least = tokens
            logger.warning(
                f"A micro-batch of {tokens:,} tokens does not fit into memory. It is halved, and so are later ones of"
                " that size; gradients stay those of the whole batch. To save the failed attempts, set"
                f" max_tokens_per_microbatch={max(tokens // 2, 1)}"
            )
        return self._halved(piece)

    def smallest(self, piece: Piece) -> Piece:
        """The shortest row of a micro-batch as a micro-batch; itself if its rows are not known."""
        if not piece.examples or piece.part is not None:
            return piece
        return self._of(piece, [min(piece.examples, key=lambda example: self.collator.num_tokens(example[1]))])

    def _in_parts(self, piece: Piece) -> list[Piece]:
        tokens = piece.num_tokens
        if self.least_of_row is None or tokens < self.least_of_row:
            self.least_of_row, self.least_prompt = tokens, None  # smaller parts may leave space for the prompt
            logger.warning(
                f"{tokens:,} tokens of one row do not fit into memory. Its sequences run in parts, and so do those of"
                " later rows of that size; gradients stay those of the whole row. To save the failed attempts, set"
                f" max_tokens_per_microbatch={max(tokens // 2, 1)}"
            )
        known: KnownWeights | None = piece.inputs.get(KNOWN)
        if piece.part is None or known is None:
            return [piece]
        halves = halves_of_part(piece.part, self.collator)
        return [Piece.of_part(half, known.of(places, first=i == 0)) for i, (half, places) in enumerate(halves)]

    def _without(self, piece: Piece, reason: str, dataset: Any, name: str) -> list[Piece]:
        assert piece.examples is not None
        row = row_of(dataset, piece.examples[0] if piece.part is None else piece.part.row)
        which = (
            f"row {row} of the prepared {name} dataset (counted from 0)" if row >= 0 else f"a row of the {name} data"
        )
        found = f"{which} has {piece.num_tokens:,} tokens and does not fit into memory by itself"
        if self.on_oversized_row == "split":
            found = f"{which} has a sequence of {piece.num_tokens:,} tokens that does not fit into memory by itself"
        if self.on_oversized_row != "skip":
            remedy = "leave such rows out with on_oversized_row='skip'"
            if self.on_oversized_row != "split":
                remedy = f"run their responses one by one with on_oversized_row='split', or {remedy}"
            raise ValueError(
                f"max_length must be smaller: {found} ({reason}). Turn on gradient_checkpointing, {remedy}"
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
        if piece.own_items is not None:
            inputs = piece.own_items(inputs)
        moved = dict(OneBuffer(inputs).to(piece.inputs["input_ids"].device))
        return Piece(moved, tuple(examples), own_items=piece.own_items)


def _release() -> None:
    """Gives what a failed attempt has left behind back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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
