"""How long a step takes on one GPU with each setting, by FLOPs, its memory and the bus to the host.

In: settings, the sizes of a model, a GPU and the pairs of a step. Out: seconds. As in `cluster/step_time.py`, these are
computed from the data sheet and not measured; `fastdpo plan` prints the ASSUMPTIONS. They serve to compare settings:
elementwise work, which all of them do, is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastdpo.training.memory.card.settings import Settings
from fastdpo.training.memory.cluster.hardware import Gpu
from fastdpo.training.memory.cluster.sizes import ModelSizes
from fastdpo.training.memory.cluster.step_time import (
    COMPUTE_SHARE,
    RATE_SHARE,
    ROWS_SHARE,
    flops_of_pair,
    layer_flops,
)
from fastdpo.training.memory.quantized import BYTES

EPOCHS = 3  # transformers' default of num_train_epochs, over which cached log-probs are computed once
MOMENT_BYTES = {"adamw_torch_fused": 8, "adamw_bnb_8bit": 2, "paged_adamw_8bit": 2}  # both moments of a weight
UNPACK_BYTES = BYTES[4] + 2  # per 4-bit weight and pass: it is read, and written in bf16
TILE_SUM_BYTES = 2 * 2 + 2 * 4  # per weight and tile: its gradient in bf16, and the fp32 sum, each written and read
ASSUMPTIONS = (
    f"{COMPUTE_SHARE:.0%} of the GPU's bf16 FLOPs and {RATE_SHARE:.0%} of the rates of its memory and of its bus",
    "checkpointed layers run forward again; in tiles, attention's projections with an adapter do once more, and the"
    " gradients of all other weights of layers are added up tile by tile",
    "checkpoints on the host are copied while layers compute; what takes longer than they do counts",
    "4-bit weights are written in bf16 for every pass; paged moments cross the bus in every update",
    f"a reference costs a forward of every pair, cached log-probs one in {EPOCHS} epochs",
    "norms, rotary positions and other elementwise work, the same for all settings, are left out",
)


@dataclass(frozen=True)
class StepSeconds:
    """One optimizer step, or as many as its pairs take if weights are updated in backward."""

    microbatches: int
    compute: float  # products, or reading their weights if that takes longer
    traffic: float  # other traffic of the GPU's memory: 4-bit weights, gradients that are added up
    bus: float  # copies of checkpoints beyond the computation that hides them
    optimizer: float

    @property
    def total(self) -> float:
        return self.compute + self.traffic + self.bus + self.optimizer


def step_seconds(
    sizes: ModelSizes,
    gpu: Gpu,
    settings: Settings,
    *,
    num_pairs: int,
    pair_tokens: int,
    largest_microbatch: int,
    tile_rows: int,
    workspace_bytes: int,
) -> StepSeconds:
    """Args:
    num_pairs: of the step.
    pair_tokens: of a pair, its prompt once.
    largest_microbatch: tokens that fit; at least those of a pair.
    tile_rows: of a tile, if the settings have tiles.
    workspace_bytes: of the head op.
    """
    is_full = settings.method == "full"
    most = 1 if settings.in_backward else max(largest_microbatch // pair_tokens, 1)
    count = math.ceil(num_pairs / most)
    tokens = math.ceil(num_pairs / count) * pair_tokens  # of a micro-batch
    repeated = 1 / settings.every_n_layers if settings.checkpointing else 0.0
    references = 1 / EPOCHS if settings.reference == "cached" else 1.0
    flop_rate, memory_rate = COMPUTE_SHARE * gpu.flops, RATE_SHARE * gpu.memory_rate
    host_rate = RATE_SHARE * gpu.host_rate

    flops = flops_of_pair(sizes, pair_tokens, full=is_full, repeated=repeated, references=references)
    projections = _projection_weights(sizes)
    if settings.tiles and not is_full:
        flops += 2 * projections * pair_tokens
    passes = 2 + repeated + references  # through frozen weights
    reads = count * (passes + is_full) * 2 * sizes.all.count
    traffic = 0.0
    if settings.method == "qlora":
        traffic += count * passes * UNPACK_BYTES * sizes.linear
    if is_full:
        rows = ROWS_SHARE * tokens
        chunks = math.ceil(rows * 2 * sizes.vocab_size / workspace_bytes)
        traffic += count * (2 * chunks - 1) * 4 * sizes.vocab_size * sizes.hidden_size
    if is_full and settings.tiles:
        traffic += count * math.ceil(tokens / tile_rows) * TILE_SUM_BYTES * (sizes.linear - projections)
    return StepSeconds(
        microbatches=count,
        compute=max(num_pairs * flops / flop_rate, reads / memory_rate),
        traffic=traffic / memory_rate,
        bus=num_pairs * _uncovered_seconds(sizes, settings, pair_tokens, flop_rate, host_rate),
        optimizer=_update_seconds(sizes, settings, memory_rate, host_rate) * (count if settings.in_backward else 1),
    )


def _projection_weights(sizes: ModelSizes) -> int:
    """Weights of the queries, keys, values and output of attention."""
    numbers = 2 * (sizes.num_heads + sizes.num_kv_heads) * sizes.head_dim
    return min(sizes.num_layers * sizes.hidden_size * numbers, sizes.linear)


def _uncovered_seconds(
    sizes: ModelSizes, settings: Settings, pair_tokens: int, flop_rate: float, host_rate: float
) -> float:
    """Of a pair: copies to the host that take longer than forward, and back that take longer than two forwards."""
    if not settings.offload:
        return 0.0
    size = 4 if settings.method == "full" and settings.weight_rounding == "nearest" else 2  # of the residual stream
    copies = sizes.num_layers * pair_tokens * sizes.hidden_size * size / host_rate
    forward = layer_flops(sizes, pair_tokens) / flop_rate
    return max(copies - forward, 0.0) + max(copies - 2 * forward, 0.0)


def _update_seconds(sizes: ModelSizes, settings: Settings, memory_rate: float, host_rate: float) -> float:
    """Of all trained weights: gradient, weight and moments are read, and the last two written."""
    trained, moments = sizes.all.trained, MOMENT_BYTES[settings.optim]
    seconds = (3 * sizes.all.trained_bytes + 2 * moments * trained) / memory_rate
    return seconds + ("paged" in settings.optim) * 2 * moments * trained / host_rate
