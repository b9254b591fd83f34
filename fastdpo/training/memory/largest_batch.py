"""The largest expected micro-batches of a run, in training and in evaluation, for memory estimates.

In: a Run. Out: a RowShape. Batches are compared by the lengths of their rows; only the largest are collated.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fastdpo.data.batches.lengths import row_lengths
from fastdpo.modeling.prompt_once import after_prompt
from fastdpo.training.inputs.collator import examples_of, microbatches_of
from fastdpo.training.inputs.streams import known_rows
from fastdpo.training.memory.dry_run import RowShape
from fastdpo.training.memory.out_of_memory import OutOfMemory, Piece
from fastdpo.training.memory.row_parts import why_prompt_of_run_repeats
from fastdpo.training.run import Run
from fastdpo.types import PackedBatch


class _Sizes:
    """Numbers of tokens that rows of a dataset take in a batch, computed from their lengths."""

    def __init__(self, run: Run, dataset: Any) -> None:
        lengths = row_lengths(dataset)
        self.is_packed = run.is_packed
        self.num_responses = lengths.per_row(np.ones_like(lengths.responses))
        copies = 1 if run.args.prefix_sharing else self.num_responses
        self.packed = copies * lengths.prompts + lengths.per_row(lengths.responses)
        self.prompts = lengths.prompts
        self.longest = np.zeros_like(lengths.prompts)
        np.maximum.at(self.longest, lengths.rows, lengths.sequences)

    def alone(self) -> Any:
        """(N,) number of tokens of each row by itself."""
        return self.packed if self.is_packed else self.num_responses * self.longest

    def together(self, rows: Sequence[int]) -> int:
        rows = list(rows)
        return int(
            self.packed[rows].sum() if self.is_packed else self.num_responses[rows].sum() * self.longest[rows].max()
        )


def largest_microbatch(run: Run, num_draws: int = 200) -> RowShape:
    """The largest micro-batch among randomly drawn batches and the longest row alone. With length bucketing, the batch
    of the longest rows; if the token limit is still to be measured, the longest row.
    """
    dataset: Any = known_rows(run.train_dataset)
    if dataset is None or len(dataset) == 0:
        return RowShape(((0, 1, 0, 0),), 1)
    draw = random.Random(0)
    size = min(run.args.per_device_train_batch_size, len(dataset))
    sizes = _Sizes(run, dataset)
    by_size = sizes.alone().argsort().tolist()
    candidates = [by_size[-1:]]
    if run.args.length_bucketing:
        candidates.append(by_size[-size:])
    elif not is_measured_later(run):
        candidates.append(max((draw.sample(range(len(dataset)), size) for _ in range(num_draws)), key=sizes.together))
    return _largest_part(run, dataset, candidates)


def largest_row_in_parts(run: Run) -> RowShape | None:
    """The largest part of a row whose prompt runs once, of the row with the longest prompt and sequence; None if no
    prompt runs once."""
    dataset: Any = known_rows(run.train_dataset)
    limit = run.collator.max_tokens
    if dataset is None or len(dataset) == 0 or limit is None or run.args.on_oversized_row != "split":
        return None
    sizes = _Sizes(run, dataset)
    too_long = (sizes.alone() > limit).nonzero()[0]
    if len(too_long) == 0 or why_prompt_of_run_repeats(run):
        return None
    row = int(too_long[(sizes.prompts + sizes.longest)[too_long].argmax()])
    inputs = run.collator([dataset[row]])
    ((part, examples),) = zip(microbatches_of(inputs), examples_of(inputs), strict=True)
    oversized = OutOfMemory(run.collator, run.args.on_oversized_row)
    row_parts = oversized.parts(Piece(part, examples))
    num_prompt = oversized.shared_prompt(row_parts) if row_parts else 0
    if num_prompt == 0:
        return None
    largest = max((PackedBatch(**one.inputs) for one in row_parts), key=lambda one: one.input_ids.numel())
    segments = tuple(tuple(segment) for segment in after_prompt(largest, num_prompt).segments)
    return RowShape(segments, len(largest.labels), num_prompt=num_prompt)  # type: ignore[arg-type]


def largest_in_order(run: Run, dataset: Any) -> RowShape:
    """The largest micro-batch of an evaluation, which takes rows in order."""
    dataset = known_rows(dataset)
    sizes, size = _Sizes(run, dataset), run.args.per_device_eval_batch_size
    batches = [range(start, min(start + size, len(dataset))) for start in range(0, len(dataset), size)]
    return _largest_part(run, dataset, [max(batches, key=sizes.together)])


def _largest_part(run: Run, dataset: Any, batches: Sequence[Sequence[int]]) -> RowShape:
    inputs = [run.collator([dataset[row] for row in rows]) for rows in batches]
    parts = [PackedBatch(**part) for some in inputs for part in _as_they_run(run, some)]
    batch = max(parts, key=lambda part: part.input_ids.numel())
    shape = tuple(batch.input_ids.shape)
    if batch.is_packed:
        segments = tuple(tuple(segment) for segment in batch.segments)
        if batch.shares is not None:
            return RowShape(segments, batch.shares.longest, None, batch.shares.num_processes)  # type: ignore[arg-type]
        return RowShape(segments, len(batch.labels))  # type: ignore[arg-type]
    return RowShape((), len(batch.labels), (shape[0], shape[1]))


def _as_they_run(run: Run, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The micro-batches of a batch, and in place of a row that runs in parts its parts."""
    oversized = OutOfMemory(run.collator, run.args.on_oversized_row)
    for part, examples in zip(microbatches_of(inputs), examples_of(inputs), strict=True):
        in_parts = [row_part.inputs for row_part in oversized.parts(Piece(part, examples))]
        yield from in_parts or [part]


def is_measured_later(run: Run) -> bool:
    """Whether max_tokens_per_microbatch="auto" will be measured on the GPU when training starts."""
    is_auto = run.args.max_tokens_per_microbatch == "auto" and run.collator.max_tokens is None
    return is_auto and run.args.device.type == "cuda"
