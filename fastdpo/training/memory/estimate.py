"""Estimates the peak memory of a run, part by part: shown before the start, and the basis of `fastdpo plan`.

In: a Run, or a model without storage (`dry_run`). Out: bytes. Weights, optimizer and reference are sums over
parameters; gradients, activations, autocast's copies of weights and the head's workspace come from dry runs of a step,
of an evaluation and of a larger reference, of which the largest counts. The tests compare the sum with the allocations
of a step on the CPU; it has not been compared with a GPU yet. Sharding (FSDP, DeepSpeed) needs less and is not
included.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import nn

from fastdpo.modeling.backbone import bare_model
from fastdpo.modeling.head import lm_head
from fastdpo.modeling.offload import DryCopies, offload_checkpoints
from fastdpo.ops.eager import default_workspace_bytes
from fastdpo.ops.engine import engine_of, resolve_impl
from fastdpo.training.memory.dry_run import StepPeak, dry_step, fake_mode, shape_only
from fastdpo.training.memory.largest_batch import (
    is_measured_later,
    largest_in_order,
    largest_microbatch,
    largest_row_in_parts,
)
from fastdpo.training.memory.quantized import largest_copy, scale_bytes
from fastdpo.training.run import Run
from fastdpo.training.setup.models import head_dtype
from fastdpo.training.setup.optimizers import (
    check_optimizer_package,
    optimizer_name,
    optimizer_state_bytes,
    optimizer_step_bytes,
    trained_parameters,
    update_bytes,
)

MIB = 2**20
CUDA_BYTES = 640 * MIB  # CUDA's context and libraries, outside the allocator, with cuBLAS's workspace; about right
CUDA_WORKSPACE_BYTES = 2**28  # of the head op's kernels, which only take more if memory is free
_DDP = (DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the training device at the peak of a run."""

    weights: int
    optimizer: int  # its state, and its step's temporary memory if that is the peak
    reference: int  # a second model; 0 for an adapter, cached log-probs, or none
    casts: int  # copies of weights in autocast's dtype
    gradients: int
    head: int  # the head op's workspace and fp32 sums
    activations: int
    overhead: int  # outside PyTorch's allocator; 0 on a CPU

    @property
    def total(self) -> int:
        return sum(self.parts().values())

    @property
    def allocated(self) -> int:
        """The bytes that PyTorch counts (`torch.cuda.max_memory_allocated`)."""
        return self.total - self.overhead

    def parts(self) -> dict[str, int]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def __str__(self) -> str:
        shown = {name: size for name, size in self.parts().items() if name != "overhead" and size >= MIB / 2}
        parts = ", ".join(f"{name} {size / MIB:,.0f}" for name, size in shown.items())
        outside = f"CUDA itself takes some {self.overhead / MIB:,.0f}" if self.overhead else "Python itself comes"
        return (
            f"about {self.allocated / MIB:,.0f} MiB (an estimate)"
            + (f": {parts}" if parts else "")
            + f"; {outside} on top"
        )


def check_memory_settings(args: Any) -> None:
    """Refuses settings that would only fail when training starts, after data and reference are prepared.

    Raises:
        ValueError: the optimizer's package is not installed, or checkpoints are to be offloaded from a CPU.
    """
    check_optimizer_package(optimizer_name(args))
    kwargs = checkpointing_kwargs(args)
    if kwargs.get("offload") and args.device.type == "cpu":
        raise ValueError(f"activation_checkpointing_kwargs must not hold offload on a CPU, got {kwargs}")
    if kwargs.get("offload") and not args.gradient_checkpointing:
        raise ValueError(f"gradient_checkpointing must be on for activation_checkpointing_kwargs={kwargs}")


def checkpointing_kwargs(args: Any) -> dict[str, Any]:
    names = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")  # the second until transformers 6
    return dict(next((kwargs for name in names if (kwargs := getattr(args, name, None))), {}))


def enable_checkpointing(dry: nn.Module, kwargs: dict[str, Any]) -> None:
    """Enables checkpointing by `activation_checkpointing_kwargs`; host memory of offloaded tensors is not counted."""
    bare = bare_model(dry)
    kwargs = dict(kwargs)
    is_offloaded = kwargs.pop("offload", False)
    every = {name: kwargs.pop(name) for name in ("every_n_layers",) if name in kwargs}
    enable = getattr(bare, "activation_checkpointing_enable", None) or bare.gradient_checkpointing_enable
    enable(kwargs or None, **every)
    if is_offloaded:
        offload_checkpoints(bare, DryCopies())


def model_bytes(model: nn.Module) -> int:
    """Bytes of stored parameters and buffers; 4-bit parameters are counted packed and with their scales."""
    tensors = {*model.parameters(), *model.buffers()}
    return sum(tensor.numel() * tensor.element_size() + scale_bytes(tensor) for tensor in tensors)


def head_sums_bytes(model: nn.Module) -> int:
    """Bytes of the fp32 sums of the gradient that the head op adds up for the LM head: of its weight, of the B of its
    adapters, or 0 if it is frozen. The op's workspace grows with them, see `fastdpo.ops.eager`."""
    head = lm_head(bare_model(model))
    if head.weight.requires_grad:
        return 4 * head.weight.numel()
    return sum(4 * low_rank.b.weight.numel() for low_rank in head.low_ranks if low_rank.b.weight.requires_grad)


def estimate_step(
    dry: nn.Module,
    peak: StepPeak,
    *,
    optim: str,
    weight_bytes: int,
    reference_bytes: int = 0,
    forwards: Sequence[StepPeak] = (),
    bucket_bytes: int = 0,
    weight_rounding: str = "nearest",
    in_backward: bool = False,
    on_gpu: bool,
) -> MemoryEstimate:
    """The estimate for the model and the micro-batch of a dry run.

    Args:
        dry, peak: the model given to `dry_step`, and its result.
        weight_bytes, reference_bytes: bytes of the two models.
        forwards: peaks of the other forwards: evaluation, a reference.
        bucket_bytes: bytes of DDP's buckets, which hold gradients a second time.
        in_backward: whether weights are updated in the backward of `peak`.
    """
    trained = [p for p in dry.parameters() if p.requires_grad]
    state = optimizer_state_bytes(optim, trained_parameters(dry), weight_rounding)
    moments = []
    if not in_backward:
        gradients = sum(p.numel() * p.element_size() for p in trained)
        of_step = optimizer_step_bytes(
            optim, trained, on_gpu, one_by_one=weight_rounding != "nearest", weight_rounding=weight_rounding
        )
        moments = [MemoryEstimate(weight_bytes, state + of_step, reference_bytes, 0, gradients, 0, 0, 0)]
    for run in (peak, *forwards):
        parts = {f.name: getattr(run, f.name) for f in fields(run)}
        moments.append(MemoryEstimate(weight_bytes, state, reference_bytes, **parts, overhead=0))
    most = max(moments, key=lambda moment: moment.total)
    return replace(most, gradients=most.gradients + bucket_bytes, overhead=CUDA_BYTES if on_gpu else 0)


def estimate_peak_memory(run: Run, *, impl: str | None = None, memory: int | None = None) -> MemoryEstimate:
    """Bytes at the peak of training and evaluation, for the largest expected micro-batches.

    Args:
        impl: the head op's implementation; by default the one that runs on this machine.
        memory: of the GPU, in bytes, from which the head op takes its workspace by default; None: all that it takes is
            free. What is free is counted at the peak; more may be where the head runs, and is taken then.
    """
    args = run.args
    impl = resolve_impl(args.impl, args.device, head_dtype(run.model, args)) if impl is None else impl
    impl = impl if impl != "reference" else "tiled"
    found = _estimate(run, impl, args.workspace_bytes)
    if memory is None or args.workspace_bytes is not None:
        return found
    engine, sums_bytes = engine_of(impl), head_sums_bytes(run.model)
    most = default_workspace_bytes(engine, sums_bytes)  # the estimate has so many
    chosen = default_workspace_bytes(engine, sums_bytes, memory - found.total + most)
    return found if chosen == most else _estimate(run, impl, chosen)


def _estimate(run: Run, impl: str, workspace_bytes: int | None) -> MemoryEstimate:
    args = run.args
    mode = fake_mode()
    dry = shape_only(run.model, mode)
    if args.gradient_checkpointing:
        enable_checkpointing(dry, checkpointing_kwargs(args))
    is_split = run.collator.max_tokens is not None or is_measured_later(run)
    accumulates = args.gradient_accumulation_steps > 1 or is_split
    settings: dict[str, Any] = {
        "impl": impl,
        "varlen": any(name.startswith(("flash", "varlen")) for name in run.packing_check.backends),
        "masked": args.device.type != "cpu",
        "autocast": torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None,
        "workspace_bytes": workspace_bytes,
    }
    row = largest_microbatch(run)
    of_update = None
    if args.optimizer_in_backward:
        of_update = partial(update_bytes, optimizer_name(args), weight_rounding=args.weight_rounding)
    steps = [one for one in (row, largest_row_in_parts(run)) if one is not None]
    peaks = [dry_step(dry, one, mode, **settings, accumulates=accumulates, update_bytes=of_update) for one in steps]
    peak = max(peaks, key=lambda one: one.total)
    gradients = sum(p.numel() * p.element_size() for p in dry.parameters() if p.requires_grad)
    forwards = [
        dry_step(dry, evaluated, mode, **settings, with_grad=False)
        for dataset in _evaluated(run)
        if (evaluated := largest_in_order(run, dataset)).num_tokens > row.num_tokens
    ]
    frozen: Any = getattr(run.reference, "model", None)
    is_second = frozen is not None and bare_model(frozen) is not bare_model(run.model)
    reference_bytes = model_bytes(frozen) if is_second else 0
    if reference_bytes > model_bytes(run.model):
        of_reference = dry_step(shape_only(frozen, mode), row, mode, **settings, with_grad=False)
        forwards.append(replace(of_reference, gradients=gradients if accumulates else 0))
    estimate = estimate_step(
        dry,
        peak,
        optim=optimizer_name(args),
        weight_bytes=model_bytes(run.model),
        reference_bytes=reference_bytes,
        forwards=forwards,
        bucket_bytes=gradients if run.accelerator.distributed_type in _DDP else 0,
        weight_rounding=args.weight_rounding,
        in_backward=args.optimizer_in_backward,
        on_gpu=args.device.type == "cuda",
    )
    return replace(estimate, casts=estimate.casts + largest_copy(run.model))


def _evaluated(run: Run) -> list[Any]:
    found: Any = run.eval_dataset
    return list(found.values()) if isinstance(found, dict) else [] if found is None else [found]


def planned_impl() -> str:
    """The head op's implementation on a GPU: "triton", or "tiled" if triton is not installed."""
    return "triton" if importlib.util.find_spec("triton") else "tiled"
