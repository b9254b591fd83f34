"""How long a step takes by FLOPs, memory and network. docs/scaling.md, "Cost model", has the formulas.

In: sizes, a layout, a cluster and the pairs of a step. Out: seconds. A model of the data sheet, not a measurement:
ASSUMPTIONS says what it leaves out, and `fastdpo plan` prints them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastdpo.training.memory.cluster.hardware import Cluster
from fastdpo.training.memory.cluster.layouts import Layout
from fastdpo.training.memory.cluster.sizes import ModelSizes
from fastdpo.training.memory.cluster.traffic import MicroBatch, Precision, transfers

COMPUTE_SHARE = 0.4  # of the GPU's FLOPs that large products reach
RATE_SHARE = 0.8  # of the rates of memory and network
ADAM_BYTES = 28  # per trained weight: gradient, weight and two moments read, the last three written, in fp32
# of a pair of T tokens, half of them prompt: query-key pairs over T^2, prompt 1/8 and each branch 1/8 + 1/32
ATTENTION_SHARE = 0.4375
ROWS_SHARE = 0.5  # of a pair's tokens that go through the head
ASSUMPTIONS = (
    f"{COMPUTE_SHARE:.0%} of the GPU's bf16 FLOPs and {RATE_SHARE:.0%} of the rates of its memory and of the networks",
    "FSDP and DDP send while layers compute, so the longer of both counts; TP and SP send between computations",
    "a ring over nodes is as fast as one port of the network between nodes; each GPU has one",
    "all pairs have the same length",
)


@dataclass(frozen=True)
class StepTime:
    """One optimizer step."""

    microbatches: int  # of the process with the most
    sent: float  # bytes that a process sends
    compute: float  # seconds
    overlapped: float  # seconds of network beside computation
    blocking: float  # seconds of network between computations
    optimizer: float  # seconds

    @property
    def total(self) -> float:
        return max(self.compute, self.overlapped) + self.blocking + self.optimizer


def attention_flops(sizes: ModelSizes, tokens: int) -> float:
    """Of a forward of a pair, without the products with weights."""
    return 4 * sizes.num_heads * sizes.head_dim * sizes.num_layers * ATTENTION_SHARE * tokens**2


def layer_flops(sizes: ModelSizes, tokens: int) -> float:
    """Of a forward of a pair through the layers."""
    return 2 * sizes.active * tokens + attention_flops(sizes, tokens)


def flops_of_pair(sizes: ModelSizes, tokens: int, *, full: bool, repeated: float, references: float) -> float:
    """FLOPs of a pair of so many tokens. Backward costs a forward for the inputs, and one more for trained weights.

    Args:
        repeated: share of the layers that run forward again in backward.
        references: forwards for reference log-probs.
    """
    layers = layer_flops(sizes, tokens)
    head = 2 * sizes.vocab_size * sizes.hidden_size * ROWS_SHARE * tokens
    # attention has no weights: both its factors get gradients
    backward = 2 * layers if full else layers + attention_flops(sizes, tokens)
    of_head = head * (3 if full else 2)  # its gradient is made in forward, kernels/README.md, "Work and memory"
    return layers + repeated * layers + backward + references * (layers + head) + of_head


def step_time(
    sizes: ModelSizes,
    layout: Layout,
    cluster: Cluster,
    precision: Precision,
    *,
    num_pairs: int,
    pair_tokens: int,
    largest_microbatch: int,
    full: bool,
    checkpointing: bool,
    reference: str,
) -> StepTime:
    """Args:
    num_pairs: of the step, on all processes.
    pair_tokens: of a pair, its prompt once.
    largest_microbatch: tokens that fit; at least those of a pair.
    reference: as in `transfers`.
    """
    of_group = math.ceil(num_pairs / layout.groups)
    per_microbatch = min(max(largest_microbatch // pair_tokens, 1), of_group)
    count = math.ceil(of_group / per_microbatch)
    per_microbatch = math.ceil(of_group / count)
    references = int(reference != "cached")
    flops = of_group * flops_of_pair(sizes, pair_tokens, full=full, repeated=checkpointing, references=references)
    share = 1 / (layout.tensor * layout.sequence)
    batch = MicroBatch(per_microbatch * pair_tokens, int(per_microbatch * pair_tokens * ROWS_SHARE))
    sent = overlapped = blocking = 0.0
    for times, is_last in ((count - 1, False), (1, True)):
        found = transfers(
            sizes,
            layout,
            cluster.gpus,
            batch,
            precision,
            checkpointing=checkpointing,
            reference=reference,
            is_last=is_last,
        )
        for transfer in found:
            seconds = times * transfer.sent / (RATE_SHARE * cluster.network(transfer.crosses_nodes).rate)
            sent += times * transfer.sent
            overlapped += seconds if transfer.overlaps else 0.0
            blocking += 0.0 if transfer.overlaps else seconds
    passes = 2 + checkpointing + full + references  # each reads the weights once
    reads = count * passes * 2 * sizes.all.count / layout.tensor
    compute = max(flops * share / (COMPUTE_SHARE * cluster.gpu.flops), reads / (RATE_SHARE * cluster.gpu.memory_rate))
    update = ADAM_BYTES * sizes.all.trained / (layout.shards * layout.tensor) / (RATE_SHARE * cluster.gpu.memory_rate)
    return StepTime(count, sent, compute, overlapped, blocking, update)
