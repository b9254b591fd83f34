"""Checks for runs on streamed data, which cannot look at all rows before the start.

In: `datasets.IterableDataset`, raw or of token columns. Out: a stream that checks each group while it is read, and its
first rows. Refused with ValueError: settings that need all rows at once, a group that the model cannot handle.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import xxhash
from datasets import Dataset, IterableDataset
from torch import nn
from transformers.utils import logging

from fastdpo.data.rows.columns import column_features
from fastdpo.data.sources.arrow import arrow_column
from fastdpo.data.sources.loading import dataset_from_rows
from fastdpo.data.streaming import checked_stream
from fastdpo.modeling.backbone import bare_model
from fastdpo.modeling.head import whole_shape
from fastdpo.training.setup.models import learned_positions
from fastdpo.types import TokenizedGroup

logger = logging.get_logger(__name__)

_KNOWN_ROWS = 64
_FIRST_ROWS = 4  # that are compared when a run is resumed
_LARGEST_SEED = 2**64  # NumPy draws 128 bits where it is given no seed
_STEPS = "datasets.iterable_dataset"  # module of the steps of a stream


def is_stream(dataset: Any) -> bool:
    return isinstance(dataset, IterableDataset)


def check_stream_settings(args: Any, train_dataset: Any, eval_dataset: Any) -> None:
    """Refuses settings that do not work with streams.

    Raises:
        ValueError: max_steps is missing, or a setting needs another order or a check of all rows before the run.
    """
    # accelerate would split batches of a stream among processes, but our batches are not rows of tensors
    if args.accelerator_config.dispatch_batches:
        raise ValueError("accelerator_config.dispatch_batches must not be True: packed batches cannot be divided")
    args.accelerator_config.dispatch_batches = False
    evaluated = list(eval_dataset.values()) if isinstance(eval_dataset, dict) else [eval_dataset]
    if is_stream(train_dataset):
        if args.max_steps <= 0:
            raise ValueError(f"max_steps must be > 0 for a streamed train_dataset, got {args.max_steps}")
        for name in ("regroup_dataset", "length_bucketing"):
            if getattr(args, name):
                raise ValueError(f"{name} must be off for a streamed train_dataset, which has its own order")
    has_limit = args.max_tokens_per_microbatch is not None and args.on_oversized_row == "raise"
    if has_limit and any(map(is_stream, [train_dataset, *evaluated])):
        raise ValueError("on_oversized_row must be 'alone' for streamed data, whose rows are not known before the run")


def read_whole(stream: IterableDataset) -> Dataset:
    """The rows of a stream, read into a dataset, for evaluation by several processes: only in a dataset it is known
    which rows are repeated to give all processes equally many batches, and repeated rows must not count."""
    return dataset_from_rows(list(stream.with_format(None)))


class _ReadByAll(IterableDataset):
    """A stream that every process reads completely, taking its part of each batch.

    With enough files, accelerate would give each process its own files. One process then ends before the others,
    possibly in the middle of an accumulated step, and waits for them forever.
    """

    n_shards = 1


def guarded(stream: IterableDataset, model: nn.Module, name: str) -> IterableDataset:
    """The stream of token columns for all processes, raising ValueError at the first group whose token ids or length
    the model cannot handle."""
    num_embeddings = whole_shape(bare_model(model).get_input_embeddings().weight)[0]
    check = partial(_check_group, num_embeddings=num_embeddings, num_positions=learned_positions(model), name=name)
    checked = checked_stream(stream, check)
    checked.__class__ = _ReadByAll
    return checked


def why_unrepeatable(stream: IterableDataset) -> str | None:
    """Why a run cannot be resumed exactly on this stream; None if nothing speaks against it.

    A resumed run reads the stream again and skips the rows that are done, so every reading must give the same rows.
    """
    if any(_has_no_seed(generator) for generator in _generators(stream)):
        return "it is shuffled without a seed, so that each process gets another order; use shuffle(seed=...)"
    first, second = (_digest([next(iter(stream), {})]) for _ in range(2))
    return None if first == second else "each reading gives other rows"


class StreamStart:
    """The first rows of a training stream, which a resumed run must find again; a part of the run's progress."""

    def __init__(self, stream: IterableDataset) -> None:
        self.stream = stream
        self._digest: str | None = None

    def state(self) -> dict[str, Any]:
        if self._digest is None:
            self._digest = _digest(list(self.stream.take(_FIRST_ROWS)))
        return {"first_rows": self._digest}

    def restore(self, state: dict[str, Any]) -> None:
        if state != self.state():
            logger.warning(
                "The training stream begins with other rows than in the run that is resumed: rows that were trained on"
                " may come again, and others may be left out"
            )


def _has_no_seed(generator: np.random.Generator) -> bool:
    entropy = getattr(generator.bit_generator.seed_seq, "entropy", None)
    return isinstance(entropy, int) and entropy >= _LARGEST_SEED


def _digest(rows: list[Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(rows, default=str, sort_keys=True).encode())


def _generators(stream: IterableDataset) -> Iterator[np.random.Generator]:
    """The random generators in the steps of a stream."""
    left, seen = [stream._ex_iterable], set()
    while left:
        step = left.pop()
        seen.add(id(step))
        for value in vars(step).values():
            if isinstance(value, np.random.Generator):
                yield value
            inner = value if isinstance(value, list | tuple) else [value]
            left += [x for x in inner if type(x).__module__ == _STEPS and id(x) not in seen]


def first_rows(stream: IterableDataset, num_rows: int) -> Dataset:
    """At most `num_rows` rows from the start of a stream of token columns; reading the stream later starts again."""
    return Dataset.from_list(list(stream.take(num_rows)), features=column_features(with_state=False))


def known_rows(dataset: Any) -> Any:
    """The dataset, or the first rows of a stream as a sample for estimating sizes."""
    return first_rows(dataset, _KNOWN_ROWS) if is_stream(dataset) else dataset


def brings_ref_logps(dataset: Dataset | IterableDataset) -> bool:
    """Whether every row has reference log-probs; for a stream, whether the first row has."""
    if isinstance(dataset, IterableDataset):
        dataset = first_rows(dataset, 1)
    return len(dataset) > 0 and arrow_column(dataset, "ref_logps").null_count == 0


def check_not_streamed(datasets: Mapping[str, Any], args: Any) -> None:
    """Refuses streams with a cached reference, because the data would have to be read once before training.

    Args:
        args: the config; the message uses the setting's name that the user chose.
    Raises:
        ValueError: one of the datasets is a stream.
    """
    streamed = [name for name, dataset in datasets.items() if is_stream(dataset)]
    if streamed:
        by_trls_name = args.precompute_ref_log_probs
        rule = "precompute_ref_log_probs must be off" if by_trls_name else "reference must not be 'cached'"
        raise ValueError(
            f"{rule} if the {streamed[0]} dataset is streamed, unless all data has ref_chosen_logps and"
            " ref_rejected_logps: the stream would have to be read before training; use reference='frozen' or"
            " 'adapter', which compute them batch by batch"
        )


def _check_group(group: TokenizedGroup, *, num_embeddings: int, num_positions: int | None, name: str) -> None:
    for ids in (group.prompt_ids, *group.responses):
        for bound in (min(ids, default=0), max(ids, default=0)):
            if not 0 <= bound < num_embeddings:
                raise ValueError(f"token ids must be in [0, {num_embeddings}), the {name} stream has {bound}")
    longest = len(group.prompt_ids) + max(map(len, group.responses))
    if num_positions is not None and longest > num_positions:
        raise ValueError(
            f"max_length must be at most {num_positions}, the positions that the model has learned; the {name} stream"
            f" has a sequence of {longest} tokens"
        )
