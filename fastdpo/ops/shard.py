"""The part of a vocabulary that one process of a group holds: tensor parallelism of the LM head.

In: a process group and the number of rows of the weight on this process. Out: labels as this process's ids, and sums
over the processes. Refuses a process without rows of the weight. `vocab_parallel.py` merges the values of all parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from fastdpo.types import ELSEWHERE, IGNORE_INDEX

_GROUPS: WeakValueDictionary[str, Any] = WeakValueDictionary()  # operators take a group by its name


@dataclass(frozen=True)
class Shard:
    """This process's part of a vocabulary that is cut like `torch.chunk` cuts it, and DTensor's Shard(0)."""

    group_name: str
    num_vocab: int  # of all processes

    @classmethod
    def of(cls, group: Any, num_vocab: int | None, num_rows: int) -> Shard:
        """The shard of a process that holds `num_rows` rows of the weight; raises ValueError if that does not fit."""
        if not isinstance(group, dist.ProcessGroup):
            raise ValueError(f"process_group must be a torch.distributed.ProcessGroup, got {type(group).__name__}")
        if num_vocab is None:
            num_vocab = num_rows * group.size()
        _GROUPS[group.group_name] = group
        shard = cls(group.group_name, num_vocab)
        if shard.sizes[group.rank()] != num_rows or num_rows == 0:
            raise ValueError(
                f"lm_head_weight must hold {shard.sizes[group.rank()]} of vocab_size={num_vocab} rows on process "
                f"{group.rank()} of {group.size()} (as torch.chunk cuts them, and at least one), got {num_rows}"
            )
        return shard

    @property
    def group(self) -> Any:
        return _GROUPS[self.group_name]

    @property
    def largest(self) -> int:
        """Rows of the largest part; only the last parts are smaller."""
        return -(-self.num_vocab // self.group.size())

    @property
    def sizes(self) -> list[int]:
        return [max(0, min(self.largest, self.num_vocab - rank * self.largest)) for rank in range(self.group.size())]

    def local(self, labels: Tensor) -> Tensor:
        """Labels as ids of this process's rows; ELSEWHERE if the row belongs to another process."""
        first, size = self.group.rank() * self.largest, self.sizes[self.group.rank()]
        here = (labels >= first) & (labels < first + size)
        valid = (labels >= 0) & (labels < self.num_vocab)
        foreign = torch.where(labels == IGNORE_INDEX, IGNORE_INDEX, torch.where(valid, ELSEWHERE, -1))
        return torch.where(here, labels - first, foreign)

    def reduce(self, grad_hidden: Tensor) -> Tensor:
        """eq. (19), in place: the sum of all processes' parts."""
        dist.all_reduce(grad_hidden, group=self.group)
        return grad_hidden


def shard_of(process_group: Any, vocab_size: int | None, lm_head_weight: Tensor, impl: str) -> Shard | None:
    """The shard of the arguments of `linear_logps`; None if the weight is whole."""
    if process_group is None:
        if vocab_size not in (None, lm_head_weight.shape[0]):
            raise ValueError(
                f"vocab_size must be {lm_head_weight.shape[0]}, lm_head_weight's rows, without a process_group, got "
                f"{vocab_size}"
            )
        return None
    if impl == "reference":
        raise ValueError('impl must be "auto", "triton" or "tiled" with a process_group, got \'reference\'')
    return Shard.of(process_group, vocab_size, lm_head_weight.shape[0])
