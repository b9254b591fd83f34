"""What a process hands to collectives in one micro-batch. docs/scaling.md, "Cost model", derives the formulas.

In: a layout, the sizes of a model, and the micro-batch. Out: Transfers. `num_bytes` counts the whole tensor: the output
of a gather, the input of a reduce-scatter, the tensor of an all-reduce, and what one process hands to an all-to-all.
tests/training/test_traffic.py compares it with what processes are seen to exchange.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastdpo.training.memory.cluster.layouts import Layout
from fastdpo.training.memory.cluster.sizes import NOTHING, ModelSizes, Weights

HEAD_NUMBERS = 3 + 3  # fp32 numbers that the cut head exchanges per row: with entropy and top-1, kernels/README.md (20)
_FACTORS = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0, "all_to_all": 1.0}


@dataclass(frozen=True)
class Transfer:
    kind: str  # of the collective
    num_bytes: float
    num_processes: int
    crosses_nodes: bool
    overlaps: bool  # with computation

    @property
    def sent(self) -> float:
        """Bytes that one process sends, on a ring."""
        return _FACTORS[self.kind] * self.num_bytes * (self.num_processes - 1) / self.num_processes


@dataclass(frozen=True)
class MicroBatch:
    tokens: int  # that run, of one group of processes; shared prompts once
    rows: int  # hidden states that go through the head


@dataclass(frozen=True)
class Precision:
    """Bytes of a number."""

    gathered: float | None = None  # weights as FSDP gathers them; None: as stored
    reduced: float | None = None  # gradients as FSDP reduces them; None: as stored
    activation: float = 2.0


def transfers(
    sizes: ModelSizes,
    layout: Layout,
    gpus: int,
    batch: MicroBatch,
    precision: Precision,
    *,
    checkpointing: bool,
    adapter_reference: bool,
    is_last: bool = True,
) -> list[Transfer]:
    """Args:
    gpus: of a node.
    adapter_reference: whether another forward, without the adapter, gives reference log-probs.
    is_last: of the step; DDP reduces gradients once, FSDP2 after every micro-batch.
    """
    found = []
    if layout.shards > 1:
        found += _sharded(sizes, layout, gpus, precision, adapter_reference)
    elif layout.copies > 1 and is_last:
        found.append(Transfer("all_reduce", sizes.all.trained_bytes, layout.copies, layout.copies > gpus, True))
    passes = 2 + checkpointing + adapter_reference  # forward, backward, and the forward that a checkpoint repeats
    if layout.tensor > 1:
        found += _tensor(sizes, layout, batch, precision, passes)
    if layout.sequence > 1:
        found += _sequence(sizes, layout, batch, precision, passes)
    return [transfer for transfer in found if transfer.num_bytes > 0]


def _sharded(
    sizes: ModelSizes, layout: Layout, gpus: int, precision: Precision, adapter_reference: bool
) -> list[Transfer]:
    """Layers are gathered for forward and for backward, which also recomputes. The head stays gathered in between, and
    the embedding is gathered again if it has a gradient; the final norm, and a tied head, once for all forwards."""

    def gathered(weights: Weights) -> float:
        return weights.num_bytes if precision.gathered is None else weights.count * precision.gathered

    def reduced(weights: Weights) -> float:
        return weights.trained_bytes if precision.reduced is None else weights.trained * precision.reduced

    is_tied = sizes.head.count == 0
    ends = NOTHING if is_tied else sizes.embedding
    forwards = sizes.all + (sizes.layers + ends + sizes.head if adapter_reference else NOTHING)
    backward = sizes.layers + (ends if ends.trained else NOTHING)
    weights = gathered(forwards + backward) / layout.tensor
    gradients = reduced(sizes.all) / layout.tensor
    crosses = layout.shards * layout.tensor > gpus
    found = [
        Transfer("all_gather", weights, layout.shards, crosses, True),
        Transfer("reduce_scatter", gradients, layout.shards, crosses, True),
    ]
    if layout.copies > 1:
        found.append(Transfer("all_reduce", gradients / layout.shards, layout.copies, True, True))
    return found


def _tensor(sizes: ModelSizes, layout: Layout, batch: MicroBatch, precision: Precision, passes: int) -> list[Transfer]:
    """Two all-reduces of the hidden states in each layer and pass: after attention and after the MLP, and backward
    before them. The embedding's output is reduced too. The head exchanges numbers per row, and dH in fp32."""
    hidden = batch.tokens * sizes.hidden_size * precision.activation
    reduced = 2 * sizes.num_layers * passes * hidden + hidden + 4 * batch.rows * sizes.hidden_size
    return [
        Transfer("all_reduce", reduced, layout.tensor, False, False),
        Transfer("all_gather", 4 * HEAD_NUMBERS * batch.rows * layout.tensor, layout.tensor, False, False),
    ]


def _sequence(
    sizes: ModelSizes, layout: Layout, batch: MicroBatch, precision: Precision, passes: int
) -> list[Transfer]:
    """Queries, keys, values and the output of attention change from tokens to heads and back, in each layer and pass;
    key and value heads are repeated until the processes divide them. Log-probs are gathered with two statistics, and
    their gradients (docs/scaling.md, "Sequence parallelism")."""
    heads = 2 * sizes.num_heads + 2 * math.lcm(sizes.num_kv_heads, layout.sequence)
    tokens = -(-batch.tokens // layout.sequence)
    moved = sizes.num_layers * passes * heads * sizes.head_dim * tokens * precision.activation
    return [
        Transfer("all_to_all", moved, layout.sequence, False, False),
        Transfer("all_gather", 4 * (1 + 2 + 1) * batch.rows, layout.sequence, False, False),
    ]
