"""The ways to lay a run out over the GPUs of a cluster.

In: a cluster and the sizes of a model. Out: the layouts that the model allows. Tensor and sequence parallelism stay
inside a node, because they exchange activations in every layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fastdpo.training.memory.cluster.hardware import Cluster
from fastdpo.training.memory.cluster.sizes import ModelSizes


@dataclass(frozen=True)
class Layout:
    """How many processes share what; `shards * copies * tensor` processes in all."""

    name: str
    shards: int = 1  # processes over which FSDP divides weights, gradients and optimizer state
    copies: int = 1  # of all shards
    tensor: int = 1  # processes that share every product of a layer
    sequence: int = 1  # processes that share every row; they are among the shards or copies

    @property
    def groups(self) -> int:
        """Groups of processes with rows of their own."""
        return self.shards * self.copies // self.sequence


def layouts_for(cluster: Cluster, sizes: ModelSizes) -> list[Layout]:
    """From the simplest to the one with the longest pairs."""
    total, gpus = cluster.num_gpus, cluster.gpus
    found = [Layout("DDP", copies=total)]
    if total == 1:
        return [Layout("one GPU")]
    found.append(Layout("FSDP2", shards=total))
    if cluster.nodes > 1 and gpus > 1:
        found.append(Layout("HSDP", shards=gpus, copies=cluster.nodes))
    tensor = _largest(gpus, lambda size: sizes.num_heads % size == 0 and sizes.num_kv_heads % size == 0)
    if sizes.can_tensor_parallel and tensor > 1:
        rest = total // tensor
        found.append(Layout(f"TP {tensor}" + (" x FSDP2" if rest > 1 else ""), shards=rest, tensor=tensor))
    sequence = _largest(gpus, lambda size: sizes.num_heads % size == 0)
    if sequence > 1:
        found.append(Layout(f"FSDP2 x SP {sequence}", shards=total, sequence=sequence))
    return found


def _largest(most: int, is_valid: Callable[[int], bool]) -> int:
    return next(size for size in range(most, 0, -1) if most % size == 0 and is_valid(size))
