"""The token limit of micro-batches: finds rows that exceed a given limit, and the limit that fits the free memory.

The limit for "auto" is measured: a small and a larger batch of real rows run forward and backward, and the difference
of their peaks gives the memory per token. Attention over variable lengths, the layers with or without checkpointing,
and the head's rows all take memory in proportion to tokens. This has not run on a GPU yet: the tests measure saved
activations on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from fastdpo.data.batches.lengths import row_lengths
from fastdpo.data.prepare import group_from_columns
from fastdpo.training.inputs.collator import PackingCollator
from fastdpo.training.run import Run
from fastdpo.training.setup.optimizers import optimizer_name, optimizer_state_bytes, trained_parameters
from fastdpo.types import PackedBatch

logger = logging.get_logger(__name__)

USABLE_SHARE = 0.85  # of the free memory; the rest is for fragments of the allocator and for sequences above average
PROBE_TOKENS = 3072  # of the larger batch that is measured; the smaller one has a third of its rows
ROUNDING = 256  # tokens


def check_row_sizes(dataset: Dataset, name: str, collator: PackingCollator, on_oversized_row: str) -> None:
    """Warns once about rows that exceed the collator's limit by themselves, or refuses them.

    Raises:
        ValueError: a row exceeds the limit, and on_oversized_row is "raise".
    """
    limit = collator.max_tokens
    if limit is None or not isinstance(dataset, Dataset):  # the rows of a stream are not known
        return
    lengths = row_lengths(dataset)
    if collator.is_packed:
        at_most = lengths.per_row(lengths.sequences)  # as if nothing were shared
    else:
        longest = np.zeros_like(lengths.prompts)
        np.maximum.at(longest, lengths.rows, lengths.sequences)
        at_most = longest * np.bincount(lengths.rows)
    candidates = np.flatnonzero(at_most > limit).tolist()
    sizes = {row: collator.num_tokens(group_from_columns(dataset[row])) for row in candidates}
    oversized = [row for row, size in sizes.items() if size > limit]
    if not oversized:
        return
    largest = max(oversized, key=lambda row: sizes[row])
    found = (
        f"{len(oversized)} of {len(dataset)} rows of the {name} dataset have more tokens than"
        f" max_tokens_per_microbatch={limit}: row {largest} (counted from 0) has {sizes[largest]}"
    )
    if on_oversized_row == "raise":
        raise ValueError(f"{found}; raise the limit, lower max_length, or set on_oversized_row='alone'")
    if on_oversized_row != "split":
        logger.warning(f"{found}. Each of them runs in its own micro-batch, which needs more memory.")
        return
    most = int(lengths.sequences.max())
    more = f". A sequence runs whole: the longest has {most}, which needs more memory." if most > limit else "."
    logger.warning(f"{found}. Their responses run in several micro-batches, with one more forward{more}")


class MemoryMeter(Protocol):
    """The facts about a device's memory that `tokens_that_fit` needs, in bytes."""

    def free(self) -> int:
        """Bytes that can still be allocated."""
        ...

    def peak_of(self, run: Callable[[], None]) -> int:
        """The peak bytes of `run` beyond those allocated before."""
        ...


class CudaMeter:
    """The memory of one CUDA device, within this process's limit if one is set."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def free(self) -> int:
        allocated = torch.cuda.memory_allocated(self.device)
        outside, total = torch.cuda.mem_get_info(self.device)
        free = outside + torch.cuda.memory_reserved(self.device) - allocated
        share = getattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0)(self.device)
        return min(free, int(share * total) - allocated)

    def peak_of(self, run: Callable[[], None]) -> int:
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        run()
        return torch.cuda.max_memory_allocated(self.device) - before


def tokens_that_fit(
    run_rows: Callable[[list[dict[str, Any]]], None],
    dataset: Dataset,
    collator: PackingCollator,
    meter: MemoryMeter,
    reserved_bytes: int,
) -> int:
    """The tokens of the largest micro-batch that the free memory holds.

    Args:
        run_rows: runs a batch of rows forward and backward, and releases all memory.
        reserved_bytes: bytes reserved for the optimizer's state, which is not allocated yet.
    Raises:
        ValueError: the free memory is too small for a useful micro-batch.
    """
    rows = _first_rows(dataset, collator, PROBE_TOKENS)
    batches = [rows[: max(len(rows) // 3, 1)], rows]
    run_rows(batches[0])  # libraries allocate their workspaces in the first run
    peaks = [meter.peak_of(partial(run_rows, batch)) for batch in batches]
    tokens = [collator(batch)["input_ids"].numel() for batch in batches]
    return fit_line(tokens, peaks, meter.free() * USABLE_SHARE - reserved_bytes)


def fit_line(tokens: list[int], peaks: list[int], num_bytes: float) -> int:
    """The number of tokens, rounded down, at which the line through two measurements reaches `num_bytes`.

    Raises:
        ValueError: the number is below the rounding unit, or the line does not rise.
    """
    per_token = (peaks[1] - peaks[0]) / max(tokens[1] - tokens[0], 1)
    fixed = max(peaks[0] - per_token * tokens[0], 0)  # gradients of the weights, workspaces
    fitting = (num_bytes - fixed) / per_token if per_token > 0 else 0
    if fitting < ROUNDING:
        raise ValueError(
            "max_tokens_per_microbatch must be a number, got 'auto', which finds no space for a micro-batch"
            f" ({per_token:,.0f} bytes a token and {fixed:,.0f} once, {num_bytes:,.0f} free)"
        )
    return int(fitting) // ROUNDING * ROUNDING


def _first_rows(dataset: Dataset, collator: PackingCollator, num_tokens: int) -> list[dict[str, Any]]:
    """Rows from the start of the dataset with about the given number of tokens, or all rows if it has fewer."""
    rows: list[dict[str, Any]] = []
    found = 0
    for row in dataset:
        if found >= num_tokens:
            break
        rows.append(row)
        found += collator.num_tokens(group_from_columns(row))
    return rows


def optimizer_bytes(model: nn.Module, optimizer: Any, name: str, weight_rounding: str = "nearest") -> int:
    """The bytes that the optimizer's state will still need after its first step, by its name."""
    if optimizer is not None and len(optimizer.state) > 0:
        return 0
    return optimizer_state_bytes(name, trained_parameters(model), weight_rounding)


def steps_in_backward(trainer: Trainer) -> bool:
    """Whether weights change before the whole gradient is computed: with DeepSpeed's engine, LOMO, and
    optimizer_in_backward."""
    args = trainer.args
    return trainer.is_deepspeed_enabled or args.optimizer_in_backward or "lomo" in optimizer_name(args)


def check_can_split(trainer: Trainer) -> None:
    """Refuses setups that cannot run a batch in micro-batches.

    Raises:
        ValueError: the engine steps by itself in backward, or "auto" is set and free memory cannot be measured.
    """
    budget = trainer.args.max_tokens_per_microbatch
    optim = optimizer_name(trainer.args)
    if steps_in_backward(trainer) and not trainer.is_deepspeed_enabled:
        raise ValueError(
            f"max_tokens_per_microbatch must be None with optim {optim!r}, which ends each step itself, got {budget}"
        )
    if budget == "auto" and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        engine = "FSDP" if trainer.is_fsdp_enabled else "DeepSpeed"
        raise ValueError(
            f"max_tokens_per_microbatch must be a number with {engine}, got 'auto': one process cannot measure what"
            f" {engine} holds in a step of all processes"
        )


def check_can_run_in_parts(trainer: Trainer, data_collator: Any, *, shards_weights: bool) -> None:
    """Refuses on_oversized_row="split" where it cannot work.

    Raises:
        ValueError: weights are sharded, the engine steps in backward, or the collator does not tell the rows.
    """
    if trainer.args.on_oversized_row != "split":
        return
    why = ""
    if steps_in_backward(trainer):
        why = "the optimizer steps in backward, before the other parts of a row have run"
    elif shards_weights:
        why = "processes with sharded weights must run equally many micro-batches, and only one may hold a long row"
    elif trainer.args.row_group_size > 1:
        why = f"{trainer.args.row_group_size} processes compute each row together already"
    elif data_collator is not None:
        why = f"the data_collator, {type(data_collator).__name__}, does not tell which rows a batch holds"
    if why:
        raise ValueError(
            f"on_oversized_row must be 'alone', 'raise' or 'skip' here, got 'split': {why}; lower max_length if a row"
            " does not fit"
        )


class BudgetAtStart(TrainerCallback):
    """Finds the limit for "auto" when model, optimizer and checkpointing are in their final state.

    Args:
        run: whose collator is told the number.
        loss_of: the loss of a micro-batch, with a graph, in the precision of the run.
    """

    def __init__(self, run: Run, loss_of: Callable[[PackedBatch], Tensor]) -> None:
        self.run, self.loss_of = run, loss_of

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        if args.max_tokens_per_microbatch != "auto" or self.run.collator.max_tokens is not None:
            return
        meter = self.meter(args.device)
        if meter is None:
            logger.info("max_tokens_per_microbatch='auto' sets no limit on a CPU")
            return
        reserved = optimizer_bytes(model, optimizer, optimizer_name(args), args.weight_rounding)
        run_rows = partial(self.run_rows, model, args.device)
        fitting = tokens_that_fit(run_rows, self.run.train_dataset, self.run.collator, meter, reserved)
        self.run.collator.max_tokens = fitting
        logger.warning(f"max_tokens_per_microbatch='auto' found space for {fitting} tokens")
        check_row_sizes(self.run.train_dataset, "train", self.run.collator, args.on_oversized_row)

    def run_rows(self, model: nn.Module, device: torch.device, rows: list[dict[str, Any]]) -> None:
        """Runs one micro-batch forward and backward as in training, and drops its gradients."""
        was_training = model.training
        model.train()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            self.loss_of(PackedBatch(**self.run.collator(rows)).to(device)).backward()
        model.zero_grad(set_to_none=True)
        model.train(was_training)

    def meter(self, device: torch.device) -> MemoryMeter | None:
        return CudaMeter(device) if device.type == "cuda" else None
