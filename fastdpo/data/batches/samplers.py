"""Opt-in orders of a training set in place of the uniform shuffle: rows of one prompt together, or rows of similar
length in one step.

The order depends only on seed and epoch, so every process has the same order and a resumed run continues it. The
sampler asks for the epoch itself, because accelerate's `set_epoch` does not reach the sampler of a run that is resumed
on several processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized

import numpy as np
from torch.utils.data import Sampler


class _EpochSampler(Sampler[int]):
    """Base class: subclasses give the order of an epoch; `epoch_of` returns the epoch when an iteration begins."""

    def __init__(self, seed: int, epoch_of: Callable[[], int]) -> None:
        self.seed = seed
        self.epoch_of = epoch_of

    def __iter__(self) -> Iterator[int]:
        return iter(self.order(np.random.default_rng((self.seed, self.epoch_of()))).tolist())

    def order(self, rng: np.random.Generator) -> np.ndarray:
        raise NotImplementedError


class PromptSampler(_EpochSampler, Sized):
    """Prompts in random order; the rows of a prompt follow one another, also in random order.

    Args:
        prompts: (N,) int64, equal for rows of equal prompts.
    """

    def __init__(self, prompts: np.ndarray, seed: int, epoch_of: Callable[[], int]) -> None:
        super().__init__(seed, epoch_of)
        self.prompts = prompts

    def __len__(self) -> int:
        return len(self.prompts)

    def order(self, rng: np.random.Generator) -> np.ndarray:
        place = rng.permutation(int(self.prompts.max(initial=-1)) + 1)[self.prompts]
        return np.lexsort((rng.random(len(place)), place))


class LengthSampler(_EpochSampler, Sized):
    """Steps of rows of similar length, in random order.

    Rows are shuffled and cut into blocks of `STEPS_PER_BLOCK` steps; within a block they are sorted by length and cut
    into steps. The steps of all blocks are then shuffled, except an incomplete one, which comes last.

    Args:
        lengths: (N,) tokens of each row.
        step_size: rows of an optimizer step, on all processes.
    """

    STEPS_PER_BLOCK = 50

    def __init__(self, lengths: np.ndarray, step_size: int, seed: int, epoch_of: Callable[[], int]) -> None:
        super().__init__(seed, epoch_of)
        self.lengths = lengths
        self.step_size = step_size

    def __len__(self) -> int:
        return len(self.lengths)

    def order(self, rng: np.random.Generator) -> np.ndarray:
        shuffled = rng.permutation(len(self.lengths))
        num_whole = len(shuffled) - len(shuffled) % self.step_size
        whole, rest = shuffled[:num_whole], shuffled[num_whole:]
        block = np.arange(num_whole) // (self.step_size * self.STEPS_PER_BLOCK)
        steps = whole[np.lexsort((self.lengths[whole], block))].reshape(-1, self.step_size)
        return np.concatenate([rng.permutation(steps).reshape(-1), rest])
