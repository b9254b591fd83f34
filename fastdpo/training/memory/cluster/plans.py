"""Plans of a cluster: for every layout and training method, the longest pair, and bytes and seconds of a step.

In: a model's config and a Cluster. Out: a ClusterPlan for every candidate, including those that do not fit. Activations
come from dry runs of one GPU's step (`dry_run`) at a few lengths; lengths between lie on lines, which are above the
convex truth. Refuses LoRA if peft is not installed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import torch

from fastdpo.training.memory.card.estimates import pair_shape
from fastdpo.training.memory.card.plans import ROUNDING, USABLE_SHARE
from fastdpo.training.memory.cluster.hardware import Cluster
from fastdpo.training.memory.cluster.holding import ProcessMemory, process_memory
from fastdpo.training.memory.cluster.layouts import Layout, layouts_for
from fastdpo.training.memory.cluster.sizes import ModelSizes, model_sizes
from fastdpo.training.memory.cluster.step_time import StepTime, step_time
from fastdpo.training.memory.cluster.traffic import Precision
from fastdpo.training.memory.dry_model import DryModel
from fastdpo.training.memory.dry_run import StepPeak, fake_mode
from fastdpo.training.memory.estimate import CUDA_BYTES, CUDA_WORKSPACE_BYTES, enable_checkpointing, planned_impl
from fastdpo.training.memory.weightless import weightless_model
from fastdpo.training.setup.optimizers import optimizer_state_bytes, trained_parameters

MEASURED_TOKENS = (512, 16_384, 1_048_576)  # those between and beyond are on the lines through these points
MOST_TOKENS = 2**27  # longer pairs are not looked for
OPTIMIZER = "adamw_torch_fused"
REFERENCES = {"full": ("frozen", "cached"), "lora": ("adapter",)}  # by method
# With bf16, accelerate's policy for FSDP2 gathers weights and reduces gradients in bf16.
BF16 = Precision(gathered=2, reduced=2, activation=2)


@dataclass(frozen=True)
class ClusterPlan:
    layout: Layout
    method: str  # "full" or "lora"
    reference: str  # one of REFERENCES
    checkpointing: bool
    tokens: int  # of the longest pair that fits, its prompt once; 0 if the pair that is asked for does not fit
    memory: ProcessMemory  # at so many tokens, or at the tokens asked for
    time: StepTime | None  # of a step; None where nothing fits


class MethodModel:
    """A model with a training method, without weights: its sizes, and peaks of its steps by tokens."""

    def __init__(self, config: Any, method: str, checkpointing: bool, lora_r: int) -> None:
        self.method, self.checkpointing = method, checkpointing
        model: Any = weightless_model(
            config, torch.float32 if method == "full" else torch.bfloat16, _lora(method, lora_r)
        )
        if method != "full":
            model.enable_input_require_grads()
        self.sizes: ModelSizes = model_sizes(model)
        self.state_bytes = optimizer_state_bytes(OPTIMIZER, trained_parameters(model))
        self.bytes_of_hidden_state = 4 if method == "full" else 2  # the residual stream has the embedding's dtype
        self._dry = DryModel(model, fake_mode(), (lambda dry: enable_checkpointing(dry, {})) if checkpointing else None)
        self._peaks: dict[int, StepPeak] = {}

    def peak(self, tokens: int) -> StepPeak:
        """On the line through the two nearest measured lengths."""
        points = list(pairwise(MEASURED_TOKENS))
        low, high = next((pair for pair in points if tokens <= pair[1]), points[-1])
        first, second = self._measured(low), self._measured(high)
        at = (tokens - low) / (high - low)
        values = {
            f.name: max(int((1 - at) * getattr(first, f.name) + at * getattr(second, f.name)), 0)
            for f in fields(StepPeak)
        }
        return StepPeak(**values)

    def _measured(self, tokens: int) -> StepPeak:
        if tokens not in self._peaks:
            settings: dict[str, Any] = {"impl": planned_impl(), "varlen": True, "autocast": torch.bfloat16}
            settings |= {"accumulates": True, "workspace_bytes": CUDA_WORKSPACE_BYTES}
            self._peaks[tokens] = self._dry.step(pair_shape(tokens), **settings)
        return self._peaks[tokens]

    def memory(self, layout: Layout, tokens: int, reference: str) -> ProcessMemory:
        """Of a process, if its group runs so many tokens."""
        own = -(-tokens // layout.sequence)
        return process_memory(
            self.sizes,
            layout,
            self.peak(own),
            BF16,
            state_bytes=self.state_bytes,
            hidden_bytes=own * self.sizes.hidden_size * self.bytes_of_hidden_state,
            checkpointing=self.checkpointing,
            reference_bytes=self.sizes.all.num_bytes if reference == "frozen" else 0,
            overhead=CUDA_BYTES,
        )


def _lora(method: str, lora_r: int) -> Any:
    if method == "full":
        return None
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ValueError('a plan with LoRA needs the peft package: pip install "fastdpo[peft]"') from error
    return LoraConfig(r=lora_r, target_modules="all-linear", task_type="CAUSAL_LM")


def make_cluster_plans(
    config: Any, cluster: Cluster, *, lora_r: int, pair_tokens: int, num_pairs: int
) -> list[ClusterPlan]:
    """Every candidate, full training first.

    Args:
        pair_tokens: of each pair of a step; a plan must take at least one.
        num_pairs: of an optimizer step, on all GPUs.
    """
    plans = []
    for method in ("full", "lora"):
        of_method = [
            plan_layout(model, layout, cluster, reference, pair_tokens, num_pairs)
            for model in (MethodModel(config, method, checkpointing, lora_r) for checkpointing in (False, True))
            for reference in REFERENCES[method]
            for layout in layouts_for(cluster, model.sizes)
        ]
        names = list(dict.fromkeys(plan.layout.name for plan in of_method))
        plans += sorted(of_method, key=lambda plan: names.index(plan.layout.name))  # stable: checkpointing off, on
    return plans


def plan_layout(
    model: MethodModel, layout: Layout, cluster: Cluster, reference: str, pair_tokens: int, num_pairs: int
) -> ClusterPlan:
    """The longest pair that fits with this layout, and a step of `num_pairs` pairs of `pair_tokens` tokens."""
    kind = (layout, model.method, reference, model.checkpointing)
    tokens = largest(lambda tokens: model.memory(layout, tokens, reference).total <= USABLE_SHARE * cluster.memory)
    if tokens < pair_tokens:
        return ClusterPlan(*kind, 0, model.memory(layout, pair_tokens, reference), None)
    time = step_time(
        model.sizes,
        layout,
        cluster,
        BF16,
        num_pairs=num_pairs,
        pair_tokens=pair_tokens,
        largest_microbatch=tokens,
        full=model.method == "full",
        checkpointing=model.checkpointing,
        reference=reference,
    )
    return ClusterPlan(*kind, tokens, model.memory(layout, tokens, reference), time)


def largest(fits: Callable[[int], bool]) -> int:
    """The largest multiple of ROUNDING that fits, 0 if none does; what is larger takes more."""
    low, high = 0, MOST_TOKENS // ROUNDING
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * ROUNDING) else (low, middle - 1)
    return low * ROUNDING
