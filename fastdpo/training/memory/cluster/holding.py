"""What a process of a layout holds at the peak of a step. docs/scaling.md, "Cost model", derives the formulas.

In: the peak of one micro-batch on one GPU, as a dry run measures it (`dry_run.StepPeak`), and the sizes of the model.
Out: bytes by part. tests/training/test_memory_per_process.py compares their sum with what processes are seen to hold.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from fastdpo.training.memory.cluster.layouts import Layout
from fastdpo.training.memory.cluster.sizes import ModelSizes, Weights
from fastdpo.training.memory.cluster.traffic import Precision
from fastdpo.training.memory.dry_run import StepPeak

# FSDP2 holds the layer that runs, the next one as it was received and as it was copied, and the buffer of gradients; of
# embedding and head, which run alone, the weights, their gradient and its buffer (frozen: as received and as copied)
LAYERS_AT_ONCE, ENDS_AT_ONCE = 3, 3
KEPT_BY_CHECKPOINTS, KEPT_BY_LAYERS = 1, 4  # hidden states of a layer that tensor parallelism does not divide


@dataclass(frozen=True)
class ProcessMemory:
    """Bytes of one process at the peak of a step."""

    weights: float
    optimizer: float
    gradients: float  # with DDP's buckets
    reference: float  # a second, frozen model
    gathered: float  # weights and gradients of whole layers under FSDP; copies of weights in autocast's dtype otherwise
    head: float  # the head op's workspace and fp32 sums
    activations: float
    overhead: float

    @property
    def total(self) -> float:
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


def process_memory(
    sizes: ModelSizes,
    layout: Layout,
    peak: StepPeak,
    precision: Precision,
    *,
    state_bytes: float,
    hidden_bytes: float,
    checkpointing: bool,
    reference_bytes: float = 0.0,
    overhead: float = 0.0,
) -> ProcessMemory:
    """Args:
    peak: of the tokens that the process runs: with sequence parallelism, its part of the row.
    state_bytes: of the optimizer of the whole model.
    hidden_bytes: of one layer's hidden states (T, H).
    reference_bytes: of a frozen copy of the model. Its forward runs before the policy's and holds less at once.
    """
    of_all = sizes.all
    divided = (sizes.linear + sizes.embedding.count + sizes.head.count) / max(of_all.count, 1)
    share = divided / layout.tensor + 1 - divided  # of the weights that a process of a tensor parallel group has
    parts = layout.shards
    activations: float = peak.activations
    if layout.tensor > 1:
        kept = hidden_bytes * sizes.num_layers * (KEPT_BY_CHECKPOINTS if checkpointing else KEPT_BY_LAYERS)
        activations = min(kept, activations) + max(activations - kept, 0) / layout.tensor
    has_buckets = parts == 1 and layout.copies > 1
    return ProcessMemory(
        weights=of_all.num_bytes * share / parts,
        optimizer=state_bytes * share / parts,
        gradients=of_all.trained_bytes * share / parts * (2 if has_buckets else 1),
        reference=reference_bytes * share / parts,
        gathered=_gathered(sizes, precision) / layout.tensor if parts > 1 else peak.casts / layout.tensor,
        head=peak.head / layout.tensor,
        activations=activations,
        overhead=overhead,
    )


def _gathered(sizes: ModelSizes, precision: Precision) -> float:
    def whole(weights: Weights) -> float:
        return weights.num_bytes if precision.gathered is None else weights.count * precision.gathered

    layer, end = sizes.largest_layer, max(whole(sizes.embedding), whole(sizes.head + sizes.rest))
    gradients = layer.trained_bytes if precision.reduced is None else layer.trained * precision.reduced
    return max(LAYERS_AT_ONCE * whole(layer) + gradients, ENDS_AT_ONCE * end)
