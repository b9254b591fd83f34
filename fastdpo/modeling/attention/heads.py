"""Attention whose row several processes hold in parts: heads are exchanged for tokens, and back (Ulysses, arXiv
2309.14509).

In: queries, keys and values of all heads for the tokens of this process. Between: those of a part of the heads for the
whole row, which attention takes as on one process, so that shared prompts stay shared. Out: the output of all heads for
the tokens of this process. One all-to-all each way. Keys and values whose heads the processes cannot divide equally are
repeated first, as few times as possible. Refuses a number of query heads that the processes do not divide.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdpo.modeling.attention.call import attention_dtype
from fastdpo.modeling.sequence_group import SequenceGroup


def to_heads(group: SequenceGroup, *tensors: Tensor) -> list[Tensor]:
    """Each (1, heads, T / N, D), with numbers of heads and D of its own -> each (1, heads / N, T, D).

    Raises:
        ValueError: N does not divide the heads of the first tensor, the queries.
    """
    N, num_heads = group.size, tensors[0].shape[1]
    if num_heads % N:
        raise ValueError(
            f"sequence_parallel_size must divide the {num_heads} attention heads of the model, got {N}; nearest below:"
            f" {max(n for n in range(1, N) if num_heads % n == 0)}"
        )
    dtype = attention_dtype(tensors[0])  # before the exchange: autocast would cast after it
    divisible = [repeated(tensor.to(dtype), N) for tensor in tensors]
    shapes = [(tensor.shape[1] // N, tensor.shape[3]) for tensor in divisible]
    # (N, heads / N, T / N, D) -> (N, T / N, heads / N * D), all tensors side by side: one exchange
    blocks = [tensor[0].unflatten(0, (N, -1)).transpose(1, 2).flatten(2) for tensor in divisible]
    whole = group.exchange(torch.cat(blocks, dim=2)).flatten(0, 1)  # (T, sum of heads / N * D)
    parts = whole.split([heads * width for heads, width in shapes], dim=1)
    return [part.unflatten(1, shape).transpose(0, 1)[None] for part, shape in zip(parts, shapes, strict=True)]


def to_rows(group: SequenceGroup, output: Tensor) -> Tensor:
    """(1, T, heads / N, E) -> (1, T / N, heads, E)."""
    received = group.exchange(output[0].unflatten(0, (group.size, -1)))  # (N, T / N, heads / N, E)
    return received.transpose(0, 1).flatten(1, 2)[None]


def own_heads(group: SequenceGroup, numbers: Tensor) -> Tensor:
    """(heads,) -> (heads / N,): those of the heads that this process computes."""
    return numbers.unflatten(0, (group.size, -1))[group.rank]


def repeated(tensor: Tensor, num_processes: int) -> Tensor:
    """(1, heads, T, D) with heads repeated in place, until the processes divide them: 2 heads for 4 processes become
    0 0 1 1, and 6 become 12."""
    num_heads = tensor.shape[1]
    return tensor.repeat_interleave(math.lcm(num_heads, num_processes) // num_heads, dim=1)
