"""Fills a dataset's rows with reference log-probs: from the rows themselves, from the cache, and by packed forward
passes for the rest.

In: a prepared dataset, a LogpsCache, and a function that scores a batch. Out: the dataset with `ref_logps` in every
row, and the number of rows per source. Results are written every few seconds, so a killed run continues where it
stopped.
Each of several processes computes its share and reads the other shares from the files; processes that hold parts of a
model compute all rows together. Refuses log-probs that are not
finite.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.utils import logging

from fastdpo.locks import locked
from fastdpo.modeling.allocation import is_out_of_memory
from fastdpo.references.cache import LogpsCache
from fastdpo.references.rows import RowInfo, row_infos, with_ref_logps
from fastdpo.references.units import make_units, next_batch, num_tokens, read_units
from fastdpo.types import PackedBatch, TokenizedGroup

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.get_logger(__name__)

_SECONDS_PER_SHARD = 5.0
_SHARE_PER_SHARD = 0.02  # of the time so far: limits the loss by a kill and the number of shards


@dataclass(frozen=True)
class Scorer:
    """Computes missing log-probs."""

    score: Callable[[PackedBatch], Tensor]  # -> (S,) summed log-probs, nats
    collate: Callable[[Sequence[TokenizedGroup]], PackedBatch]
    is_packed: bool  # `collate` makes one row for all sequences, else one padded row per sequence
    tokens_per_batch: int
    show_progress: bool = True
    prompts_per_batch: int | None = None  # at most
    what: str = "Reference log-probs"  # name of the progress bar
    in_step: bool = False  # whether processes hold parts of the model, so that all must score the same batches


@dataclass(frozen=True)
class Filled:
    """A filled dataset, and the number of rows by source of their log-probs."""

    num_rows: int
    num_brought: int  # by the dataset itself
    num_found: int  # in the cache
    num_computed: int

    def __str__(self) -> str:
        parts = [
            (self.num_brought, "brought by the dataset"),
            (self.num_found, "found"),
            (self.num_computed, "computed"),
        ]
        return f"{self.num_rows:,} rows: " + ", ".join(f"{count:,} {what}" for count, what in parts if count)


def lacks_ref_logps(dataset: Dataset, cache: LogpsCache) -> bool:
    """Whether a row of a prepared dataset lacks reference log-probs both in the row and in the cache."""
    found = cache.read(mend=False)
    infos = (info for info in row_infos(dataset) if info.ref_logps is None)
    return any(key not in found for info in infos for key in info.keys)


def fill_ref_logps(
    dataset: Dataset, cache: LogpsCache, scorer: Scorer | None, *, name: str = "train"
) -> tuple[Dataset, Filled]:
    """The dataset with reference log-probs in every row.

    Args:
        dataset: from `prepare_preference_dataset`.
        scorer: None if the reference is no longer available.
        name: name of the dataset, for the progress bar and errors.
    Raises:
        ValueError: rows are missing and there is no scorer, processes hold different references or do not share the
            cache's folder, or a log-prob is not finite.
    """
    _check_same_everywhere(cache.key)
    infos = row_infos(dataset)
    found = cache.read(mend=_process()[0] == 0)
    wanted = [row for row, info in enumerate(infos) if info.ref_logps is None]

    def lacking() -> list[int]:
        return [row for row in wanted if any(key not in found for key in infos[row].keys)]

    missing = lacking()
    if missing and scorer is None:
        raise ValueError(
            f"the {name} dataset must have reference log-probs, got {len(missing)} rows without any, and the reference"
            " model is no longer available: pass the dataset to the trainer as eval_dataset, evaluate it before"
            " training, or use reference='frozen'"
        )
    _wait_for_all()  # all processes read before any process writes
    if scorer is not None and any(_gathered(bool(missing))):
        index, num_processes = (0, 1) if scorer.in_step else _process()
        own = [row for row in wanted if int.from_bytes(infos[row].prompt, "big") % num_processes == index]
        with _alone(cache):
            found.update(cache.read(mend=False))  # what another run has computed until now
            missing = lacking()
            _wait_for_all()
            found.update(_compute(dataset, infos, own, found, cache, scorer, name))
            _wait_for_all()
        if num_processes > 1:
            found.update(cache.read(mend=False))
    left = lacking()
    if left:
        raise ValueError(
            f"ref_cache_dir must be a folder that all processes share, got {cache.folder}, which lacks {len(left)} rows"
            " that another process computed"
        )
    values = [list(i.ref_logps) if i.ref_logps is not None else [found[key] for key in i.keys] for i in infos]
    counts = Filled(len(infos), len(infos) - len(wanted), len(wanted) - len(missing), len(missing))
    return with_ref_logps(dataset, values), counts


@contextmanager
def _alone(cache: LogpsCache) -> Iterator[None]:
    """Inside, no other run computes log-probs of this reference: it waits, and then finds them."""
    with ExitStack() as stack:
        if _process()[0] == 0:
            with suppress(ValueError):  # a read-only folder, which the first write reports
                stack.enter_context(locked(cache.folder, "ref_cache_dir", wait=_say_who_computes))
        _wait_for_all()
        yield


def _say_who_computes(holder: str) -> None:
    logger.warning(f"Waiting for {holder} which computes log-probs of the same reference")


def _compute(
    dataset: Dataset,
    infos: list[RowInfo],
    rows: list[int],
    known: dict[bytes, float],
    cache: LogpsCache,
    scorer: Scorer,
    name: str,
) -> dict[bytes, float]:
    """Scores the unknown sequences of the rows, longest first, and writes the results."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    budget = scorer.tokens_per_batch
    units = make_units(infos, rows, known, budget)
    computed: dict[bytes, float] = {}
    shard = _Shards(cache, writes=not scorer.in_step or _process()[0] == 0)
    bar = tqdm(
        total=sum(unit.num_packed for unit in units),
        desc=f"{scorer.what} ({name})",
        unit="tok",
        unit_scale=True,
        disable=not (units and scorer.show_progress and _process()[0] == 0),
    )
    start = 0
    try:
        with bar:
            while start < len(units):
                batch = next_batch(units, start, budget, scorer.is_packed, scorer.prompts_per_batch)
                try:
                    sums = scorer.score(scorer.collate(read_units(dataset, batch))).tolist()
                except RuntimeError as error:
                    if scorer.in_step or not is_out_of_memory(error):  # in step, the others would wait for this process
                        raise
                    if len(batch) == len(batch[0].members) == 1:
                        row, tokens = batch[0].members[0][0], num_tokens(batch, scorer.is_packed)
                        raise ValueError(
                            f"max_length must be smaller: row {row} of the prepared {name} dataset (counted from 0) has"
                            f" a sequence of {tokens:,} tokens, which does not fit into memory by itself"
                        ) from None
                    budget = max(num_tokens(batch, scorer.is_packed) // 2, 1)
                    logger.warning(f"Out of memory; continuing with {budget:,} tokens per batch (ref_tokens_per_batch)")
                    if len(batch) == 1:
                        units[start : start + 1] = batch[0].halves()
                    continue
                keys = [infos[row].keys[index] for unit in batch for row, index in unit.members]
                new = dict(zip(keys, sums, strict=True))
                _check_finite(list(new.values()), name)
                computed.update(new)
                shard.add(new)
                start += len(batch)
                bar.update(sum(unit.num_packed for unit in batch))
    finally:
        shard.flush()
    return computed


class _Shards:
    """Collects results and writes a shard every few seconds, so that a kill loses little."""

    def __init__(self, cache: LogpsCache, *, writes: bool = True) -> None:
        self.cache, self.writes = cache, writes
        self.start = self.written = time.monotonic()
        self.waiting: dict[bytes, float] = {}

    def add(self, logps: dict[bytes, float]) -> None:
        self.waiting.update(logps)
        now = time.monotonic()
        if now - self.written >= max(_SECONDS_PER_SHARD, _SHARE_PER_SHARD * (now - self.start)):
            self.flush()

    def flush(self) -> None:
        if self.waiting and self.writes:
            self.cache.write(list(self.waiting), list(self.waiting.values()))
        self.waiting, self.written = {}, time.monotonic()


def _check_finite(logps: list[float], name: str) -> None:
    bad = [x for x in logps if not math.isfinite(x)]
    if bad:
        raise ValueError(
            f"the reference must give finite log-probs, got {bad[0]} for {len(bad)} responses in a batch of the {name}"
            " dataset; the model may overflow in this dtype"
        )


def _check_same_everywhere(key: str) -> None:
    """Refuses processes with different models, for example if only the first process has loaded the weights."""
    if len(set(_gathered(key))) > 1:
        raise ValueError(
            "the reference must have the same weights in every process, got different ones; if FSDP loads them in one"
            " process only, run `fastdpo precompute` first or set fsdp's cpu_ram_efficient_loading to false"
        )


def _gathered(value: Any) -> list[Any]:
    """The value of every process."""
    values = [value] * _process()[1]
    if len(values) > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def _process() -> tuple[int, int]:
    """Index of this process and number of processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _wait_for_all() -> None:
    if _process()[1] > 1:
        torch.distributed.barrier()
