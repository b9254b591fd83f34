"""`balance_ranks`: the rows of each step, dealt to processes so that token counts are balanced.

In: the data loader of a run on several processes, as accelerate has prepared it. Out: the same, whose steps have the
rows they had. Left alone: one process, streams (whose rows are not known), `regroup_dataset` (which keeps the rows of a
prompt together), and the rows of an epoch that do not fill a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from typing import Any

from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset
from torch.utils.data import Sampler

from fastdpo.data.batches.dealing import deal
from fastdpo.data.batches.lengths import row_lengths
from fastdpo.training.settings.engine import EngineConfig


def balanced(dataloader: Any, dataset: Any, args: EngineConfig) -> Any:
    """The data loader, balanced if the settings ask for it and its rows are known."""
    shard = getattr(dataloader, "batch_sampler", None)
    if not args.balance_ranks or args.regroup_dataset or not isinstance(dataset, Dataset):
        return dataloader
    if isinstance(shard, BatchSamplerShard) and shard.num_processes > 1 and not shard.split_batches:
        sizes = _tokens(dataset, shared=args.prefix_sharing)
        batches = BalancedBatches(shard.batch_sampler, sizes, shard.num_processes, args.gradient_accumulation_steps)
        shard.batch_sampler = batches
    return dataloader


def _tokens(dataset: Dataset, *, shared: bool) -> list[int]:
    lengths = row_lengths(dataset)
    once = lengths.prompts + lengths.per_row(lengths.responses)
    tokens: list[int] = (once if shared else lengths.per_row(lengths.sequences)).tolist()
    return tokens


class BalancedBatches(Sampler[list[int]], Sized):
    """The batches of all processes, in the order in which BatchSamplerShard gives them to processes.

    Args:
        batches: a BatchSampler; accelerate replaces its sampler.
        sizes: tokens of each row of the dataset.
        num_batches: of each process in a step.
    """

    def __init__(self, batches: Any, sizes: Sequence[int], num_processes: int, num_batches: int) -> None:
        self.batches, self.sizes = batches, sizes
        self.num_processes, self.num_batches = num_processes, num_batches
        self.batch_size, self.drop_last = batches.batch_size, batches.drop_last

    @property
    def sampler(self) -> Any:
        return self.batches.sampler

    @sampler.setter
    def sampler(self, sampler: Any) -> None:
        self.batches.sampler = sampler

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        step: list[list[int]] = []
        for batch in self.batches:
            step.append(batch)
            if len(step) == self.num_processes * self.num_batches and len(batch) == self.batch_size:
                yield from self._dealt(step)
                step = []
        yield from step

    def _dealt(self, step: list[list[int]]) -> Iterator[list[int]]:
        rows = [row for batch in step for row in batch]
        for places in deal([self.sizes[row] for row in rows], self.num_processes, self.num_batches):
            yield [rows[place] for place in places]
