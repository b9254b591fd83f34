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

# fp32 numbers that the cut head exchanges per row, kernels/README.md (20): of log-probs, of entropy and top-1
HEAD_NUMBERS, STATISTICS_NUMBERS = 3, 3
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
    reference: str,
    is_last: bool = True,
) -> list[Transfer]:
    """Args:
    gpus: of a node.
    reference: "cached"; or "adapter" (the model without its adapter) or "frozen" (a second model), which are one
        more forward.
    is_last: of the step; DDP reduces gradients once, FSDP2 after every micro-batch.
    """
    found = []
    if layout.shards > 1:
        found += _sharded(sizes, layout, gpus, precision, reference)
    elif layout.copies > 1 and is_last:
        found.append(Transfer("all_reduce", sizes.all.trained_bytes, layout.copies, layout.copies > gpus, True))
    forwards = 1 + (reference != "cached")
    passes = forwards + 1 + checkpointing  # backward, and the forward that a checkpoint repeats
    if layout.tensor > 1:
        found += _tensor(sizes, layout, batch, precision, forwards, passes)
    if layout.sequence > 1:
        found += _sequence(sizes, layout, batch, precision, forwards, passes)
    return [transfer for transfer in found if transfer.num_bytes > 0]


def _sharded(sizes: ModelSizes, layout: Layout, gpus: int, precision: Precision, reference: str) -> list[Transfer]:
    """Layers are gathered for forward and for backward, which also recomputes. The head stays gathered in between, and
    the embedding is gathered again if it has a gradient; the final norm, and a tied head, once for all forwards of a
    model. A frozen reference has one forward, for which all of it is gathered."""

    def gathered(weights: Weights) -> float:
        return weights.num_bytes if precision.gathered is None else weights.count * precision.gathered

    def reduced(weights: Weights) -> float:
        return weights.trained_bytes if precision.reduced is None else weights.trained * precision.reduced

    is_tied = sizes.head.count == 0
    ends = NOTHING if is_tied else sizes.embedding
    again = {"cached": NOTHING, "adapter": sizes.layers + ends + sizes.head, "frozen": sizes.all}[reference]
    backward = sizes.layers + (ends if ends.trained else NOTHING)
    weights = gathered(sizes.all + again + backward) / layout.tensor
    gradients = reduced(sizes.all) / layout.tensor
    crosses = layout.shards * layout.tensor > gpus
    found = [
        Transfer("all_gather", weights, layout.shards, crosses, True),
        Transfer("reduce_scatter", gradients, layout.shards, crosses, True),
    ]
    if layout.copies > 1:
        found.append(Transfer("all_reduce", gradients / layout.shards, layout.copies, True, True))
    return found


def _tensor(
    sizes: ModelSizes, layout: Layout, batch: MicroBatch, precision: Precision, forwards: int, passes: int
) -> list[Transfer]:
    """Two all-reduces of the hidden states in each layer and pass: after attention and after the MLP, and backward
    before them. The embedding's output is reduced in each forward too. The head exchanges numbers per row in each
    forward, those of statistics in the policy's, and dH in fp32."""
    hidden = batch.tokens * sizes.hidden_size * precision.activation
    reduced = (2 * sizes.num_layers * passes + forwards) * hidden + 4 * batch.rows * sizes.hidden_size
    numbers = (HEAD_NUMBERS * forwards + STATISTICS_NUMBERS) * batch.rows
    return [
        Transfer("all_reduce", reduced, layout.tensor, False, False),
        Transfer("all_gather", 4 * numbers * layout.tensor, layout.tensor, False, False),
    ]


def _sequence(
    sizes: ModelSizes, layout: Layout, batch: MicroBatch, precision: Precision, forwards: int, passes: int
) -> list[Transfer]:
    """Queries, keys, values and the output of attention change from tokens to heads and back, in each layer and pass;
    key and value heads are repeated until the processes divide them. Log-probs are gathered in each forward, with the
    policy's two statistics, and their gradients (docs/scaling.md, "Sequence parallelism")."""
    heads = 2 * sizes.num_heads + 2 * math.lcm(sizes.num_kv_heads, layout.sequence)
    tokens = -(-batch.tokens // layout.sequence)
    moved = sizes.num_layers * passes * heads * sizes.head_dim * tokens * precision.activation
    return [
        Transfer("all_to_all", moved, layout.sequence, False, False),
        Transfer("all_gather", 4 * (forwards + 2 + 1) * batch.rows, layout.sequence, False, False),
    ]
