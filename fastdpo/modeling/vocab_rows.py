"""The rows of the LM head that one process of a tensor-parallel group holds.

In: weight and bias of the head as the model's plan has left them, plain tensors or DTensors. Out: plain tensors, and
where the rows of the other processes are. Refuses heads that are cut in another way than over the vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor


class VocabRows(NamedTuple):
    """The cut of a vocabulary over the processes of a group, as DTensor's Shard(0) makes it."""

    group: Any  # torch.distributed.ProcessGroup
    num_vocab: int  # of all processes


def own_rows(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None, VocabRows | None]:
    """Plain tensors of this process, and the cut; None if every process holds the whole head.

    Raises:
        ValueError: the head is cut in another way than by its rows.
    """
    if not is_dtensor(weight):
        return weight, bias, None
    from torch.distributed.tensor import Replicate, Shard

    parts: Any = weight
    placements = parts.placements
    if placements == (Replicate(),):
        return local(weight), None if bias is None else local(bias), None
    if placements != (Shard(0),):
        raise ValueError(
            f"the LM head must be whole or cut over the vocabulary on each process (Shard(0)), got {placements}: use"
            " 'colwise_gather_output' for it in tp_plan"
        )
    rows = VocabRows(parts.device_mesh.get_group(), parts.shape[0])
    return local(weight), None if bias is None else local(bias), rows


def local(tensor: Any) -> Tensor:
    """This process's part of a DTensor, differentiable; a plain tensor itself."""
    part: Tensor = tensor.to_local() if is_dtensor(tensor) else tensor
    return part


def is_dtensor(tensor: Any) -> bool:
    if not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)
