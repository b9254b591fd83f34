"""The order of a training set: the sampler that the settings ask for, other than Trainer's shuffle."""

from __future__ import annotations

from collections.abc import Callable

from datasets import Dataset
from torch.utils.data import Sampler

from fastdpo.data.batches.lengths import prompt_numbers, row_lengths
from fastdpo.data.batches.samplers import LengthSampler, PromptSampler
from fastdpo.training.settings.engine import EngineConfig


def sampler_for(args: EngineConfig, dataset: Dataset, epoch_of: Callable[[], int]) -> Sampler[int] | None:
    """The sampler of `regroup_dataset` or `length_bucketing`; None where neither is on."""
    seed = args.seed if args.data_seed is None else args.data_seed
    if args.regroup_dataset:
        return PromptSampler(prompt_numbers(dataset), seed, epoch_of)
    if args.length_bucketing:
        lengths = row_lengths(dataset)
        step_size = args.train_batch_size * args.gradient_accumulation_steps * args.data_parallel_size
        return LengthSampler(lengths.per_row(lengths.sequences), step_size, seed, epoch_of)
    return None
