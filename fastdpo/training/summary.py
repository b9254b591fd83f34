"""What a run will do, said before it starts: model, data, reference, kernels, attention, steps, estimated peak memory.

The facts are read off a built trainer. The memory estimate counts weights, gradients, optimizer state, the reference,
saved activations of the largest micro-batch to be expected, and the head op's workspace; allocator overhead is not in
it.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastdpo.data.columns import row_lengths
from fastdpo.modeling.packed import bare_model
from fastdpo.ops.engine import resolve_impl
from fastdpo.training.base import PackedTrainer
from fastdpo.training.models import head_dtype

MIB = 2**20
_WORKSPACE_BYTES = 64 * MIB  # a head op's tile and its fp32 accumulators, small beside the rest
_ADAM_BYTES = 8  # two fp32 moments per trained parameter


def summary_lines(trainer: PackedTrainer) -> list[tuple[str, str]]:
    """(what, fact) pairs in reading order, for the start of a run."""
    lines = [("model", _model(trainer))]
    for name, report in trainer.data_reports.items():
        text = report.lines()
        lines += [(f"{name} data", text[0]), *(("", line) for line in text[1:])]
    reference = getattr(trainer, "reference", None)
    if reference is not None:
        lines.append(("reference", f"{reference.mode}: {trainer.reference_reason}"))
    lines.append(("batches", _batches(trainer)))
    lines.append(("attention", _attention(trainer)))
    lines.append(("head op", _head_op(trainer)))
    lines.append(("steps", _steps(trainer)))
    lines.append(("peak memory", f"about {estimate_peak_memory(trainer).total / MIB:,.0f} MiB (an estimate)"))
    return lines


def _model(trainer: PackedTrainer) -> str:
    parameters = list(trainer.model.parameters())
    total, trained = (sum(p.numel() for p in ps) for ps in (parameters, [p for p in parameters if p.requires_grad]))
    dtypes = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters}))
    share = "all trained" if trained == total else f"{trained:,} trained"
    autocast = "bf16 autocast" if trainer.args.bf16 else "fp16 autocast" if trainer.args.fp16 else "no autocast"
    name = type(bare_model(trainer.model)).__name__
    return f"{name}, {total:,} parameters ({share}), {dtypes}, {autocast}, {trainer.args.device}"


def _batches(trainer: PackedTrainer) -> str:
    limit = trainer.collator.max_tokens
    auto = (
        ", in micro-batches of what the free memory holds" if trainer.args.max_tokens_per_microbatch == "auto" else ""
    )
    split = auto if limit is None else f", in micro-batches of at most {limit:,} tokens"
    if not trainer.is_packed:
        return "padded: one row per sequence" + split
    shares = trainer.args.prefix_sharing and len(trainer.data_reports["train"].tokens) > 2
    return "packed: one row without padding" + (", what responses share computed once" if shares else "") + split


def _attention(trainer: PackedTrainer) -> str:
    check = trainer.packing_check
    if trainer.is_packed:
        return str(check)
    reason = "packing='padded' was asked for" if trainer.args.packing == "padded" else check.reason
    return f"{bare_model(trainer.model).config._attn_implementation}, the model's own: {reason}"


def _head_op(trainer: PackedTrainer) -> str:
    weight = bare_model(trainer.model).get_output_embeddings().weight
    impl = resolve_impl(trainer.args.impl, trainer.args.device, head_dtype(trainer.model, trainer.args))
    why = "asked for" if trainer.args.impl != "auto" else f"chosen for {trainer.args.device.type}"
    return f"{impl} ({why}); vocabulary {weight.shape[0]:,}, hidden size {weight.shape[1]:,}"


def _steps(trainer: PackedTrainer) -> str:
    args = trainer.args
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    rows = len(trainer.train_dataset) if trainer.train_dataset is not None else 0
    per_epoch = math.ceil(rows / per_step) if rows else 0
    steps = args.max_steps if args.max_steps > 0 else math.ceil(per_epoch * args.num_train_epochs)
    return (
        f"{steps} optimizer steps of {per_step} rows ({args.per_device_train_batch_size} x"
        f" {args.gradient_accumulation_steps} accumulated x {args.world_size} processes), {per_epoch} an epoch"
    )


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the training device at the peak of a step."""

    weights: int
    gradients: int
    optimizer: int
    reference: int
    activations: int
    workspace: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.reference + self.activations + self.workspace


def estimate_peak_memory(trainer: PackedTrainer) -> MemoryEstimate:
    """Bytes at the peak of a training step, from shapes alone."""
    parameters = list(trainer.model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    weights = sum(p.numel() * p.element_size() for p in parameters)
    frozen = getattr(getattr(trainer, "reference", None), "model", None)
    return MemoryEstimate(
        weights=weights,
        gradients=sum(p.numel() * p.element_size() for p in trained),
        optimizer=sum(p.numel() for p in trained) * _ADAM_BYTES,
        reference=sum(p.numel() * p.element_size() for p in frozen.parameters()) if frozen is not None else 0,
        activations=_activation_bytes(trainer, largest_microbatch_tokens(trainer)),
        workspace=_WORKSPACE_BYTES,
    )


def largest_microbatch_tokens(trainer: PackedTrainer, num_draws: int = 200) -> int:
    """Tokens of the largest of some randomly drawn micro-batches, as packed (or padded) rows."""
    dataset = trainer.train_dataset
    if dataset is None or len(dataset) == 0:
        return 0
    draw = random.Random(0)
    size = min(trainer.args.per_device_train_batch_size, len(dataset))
    lengths = row_lengths(dataset)
    num_responses = lengths.per_row(np.ones_like(lengths.responses))
    copies = 1 if trainer.args.prefix_sharing else num_responses
    packed = copies * lengths.prompts + lengths.per_row(lengths.responses)
    longest = np.zeros_like(lengths.prompts)
    np.maximum.at(longest, lengths.rows, lengths.sequences)
    alone = packed if trainer.is_packed else num_responses * longest
    limit = trainer.collator.max_tokens
    most = math.inf if limit is None else max(limit, int(alone.max()))
    largest = 0
    for _ in range(num_draws):
        rows = draw.sample(range(len(dataset)), size)
        tokens = packed[rows].sum() if trainer.is_packed else num_responses[rows].sum() * longest[rows].max()
        largest = max(largest, int(min(tokens, most)))
    return largest


def _activation_bytes(trainer: PackedTrainer, num_tokens: int) -> int:
    """What autograd keeps: per layer two norms, attention's inputs and output, and the gated MLP's four tensors."""
    config: Any = bare_model(trainer.model).config.get_text_config()
    hidden = config.hidden_size
    layers = config.num_hidden_layers
    intermediate = getattr(config, "intermediate_size", None) or 4 * hidden
    element = 2 if trainer.args.bf16 or trainer.args.fp16 else next(trainer.model.parameters()).element_size()
    per_layer = (10 * hidden + 4 * intermediate) * element
    if trainer.args.gradient_checkpointing:  # every layer's input, and one layer in full while it is run again
        return num_tokens * (layers * hidden * element + per_layer)
    return num_tokens * layers * per_layer


def peak_memory(device: torch.device) -> int:
    """Bytes at the peak so far: allocated on a GPU, resident of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
