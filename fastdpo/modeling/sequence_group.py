"""The processes that compute one packed row together, and what they exchange, differentiable.

Every process computes the same loss from the same numbers. The gradient of a process is that of the sum of the losses
of all of them, as it is where each has a loss of its own: the backward of each exchange is the exchange in the other
direction. So DDP and FSDP2, which average gradients over all processes, need not know of these groups. Sums over
processes are computed in the order of the processes, each by itself, so that they are equal everywhere.

In: tensors of one process. Out: tensors of the whole row. docs/scaling.md counts the bytes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastdpo.types import RowShares


class SequenceGroup:
    """The group that this process is in.

    Args:
        group: process group of torch.distributed.
        device: of the tensors that it can send. Those of a model that is not there yet, as before FSDP2 shards it,
            take the way over this device.
    """

    def __init__(self, group: Any, device: torch.device | str = "cpu") -> None:
        self.group, self.device = group, torch.device(device)
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)

    def __deepcopy__(self, memo: dict[int, Any]) -> SequenceGroup:
        """The same group: a copy of the model is computed by the same processes."""
        return self

    def share(self, num_tokens: int) -> slice:
        """The tokens of this process, of a row that `data/batches/shares.py` has divided."""
        length = num_tokens // self.size
        return slice(self.rank * length, (self.rank + 1) * length)

    def exchange(self, blocks: Tensor) -> Tensor:
        """(N, ...) a block for each process -> (N, ...) the block that each process has for this one."""
        exchanged: Tensor = _Exchange.apply(blocks, self)  # type: ignore[no-untyped-call]
        return exchanged

    def gather_rows(self, values: Tensor, statistics: Tensor, shares: RowShares) -> tuple[Tensor, Tensor]:
        """The numbers of the head's rows on this process -> those of all R rows.

        Args:
            values: (r,), differentiable.
            statistics: (K, r) of the same dtype, without gradient.
        Returns:
            (R,), and (K, R).
        """
        gathered: tuple[Tensor, Tensor] = _GatherRows.apply(  # type: ignore[no-untyped-call]
            values, statistics.detach(), self, shares
        )
        return gathered

    def total(self, values: Tensor) -> Tensor:
        """The sum of the tensors of all processes."""
        summed: Tensor = _Total.apply(values, self)  # type: ignore[no-untyped-call]
        return summed

    def exchanged(self, blocks: Tensor) -> Tensor:
        """As `exchange`, without a graph."""
        sent = blocks.contiguous().to(self.device)
        received = torch.empty_like(sent)
        # as bytes: gloo lacks bf16
        dist.all_to_all_single(_bytes(received), _bytes(sent), group=self.group)
        return received.to(blocks.device)

    def gathered(self, values: Tensor) -> Tensor:
        """(N, ...) the tensors of all processes, without a graph."""
        sent = values.contiguous().to(self.device)
        received = sent.new_empty((self.size, *sent.shape))
        dist.all_gather_into_tensor(_bytes(received), _bytes(sent), group=self.group)
        return received.to(values.device)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, blocks: Tensor, group: SequenceGroup) -> Tensor:
        ctx.group = group
        return group.exchanged(blocks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.group.exchanged(grad), None


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, statistics: Tensor, group: SequenceGroup, shares: RowShares
    ) -> tuple[Tensor, Tensor]:
        ctx.group, ctx.shares, ctx.num_rows = group, shares, values.shape[0]
        table = torch.cat([values[None], statistics])  # (1 + K, r)
        table = torch.nn.functional.pad(table, (0, shares.longest - values.shape[0]))
        whole = group.gathered(table).transpose(0, 1).flatten(1).index_select(1, shares.places)  # (1 + K, R)
        gathered, statistics = whole[0].clone(), whole[1:].clone()
        ctx.mark_non_differentiable(statistics)
        return gathered, statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        group, shares = ctx.group, ctx.shares
        blocks = grad.new_zeros(group.size * shares.longest).index_copy(0, shares.places, grad)
        of_all = group.exchanged(blocks.view(group.size, shares.longest))  # each process's, for the rows here
        return of_all.sum(0)[: ctx.num_rows], None, None, None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: SequenceGroup) -> Tensor:
        ctx.group = group
        return group.gathered(values).sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.group.gathered(grad).sum(0), None
