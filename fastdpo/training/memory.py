"""What a run will hold at its peak, part by part: shown before it starts, and what `fastdpo plan` decides by.

In: a built trainer, or a model without storage (`dry_run`). Out: bytes. Weights, optimizer and reference are sums over
parameters; gradients, activations, autocast's copies of weights and the head's workspace come from a dry run of one
step. The tests hold the sum to what a step on the CPU allocates. Not in it: sharding (FSDP, DeepSpeed), which holds
less, and offloaded checkpoints, which the estimate leaves on the device. On a GPU it has not been compared yet.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from fastdpo.data.columns import row_lengths
from fastdpo.modeling.packed import bare_model
from fastdpo.ops.engine import resolve_impl
from fastdpo.training.collator import microbatches_of
from fastdpo.training.dry_run import RowShape, StepPeak, dry_step, fake_mode, shape_only
from fastdpo.training.models import head_dtype
from fastdpo.training.streams import known_rows
from fastdpo.types import PackedBatch

if TYPE_CHECKING:
    from fastdpo.training.base import PackedTrainer

MIB = 2**20
CUDA_BYTES = 640 * MIB  # CUDA's context and libraries, outside the allocator, with cuBLAS's workspace; about right
CUDA_WORKSPACE_BYTES = 2**28  # of the head op's kernels
BYTES_IN_4_BIT = 0.5 + 4 / 64  # per weight: nf4, and an fp32 scale for each block of 64

# Bytes of state per parameter where they are not two moments in the parameter's dtype; the first name found counts.
_STATE_BYTES = {
    "paged": 0.0,  # in host memory where the device has no room
    "adafactor": 0.0,  # a row and a column for each matrix
    "lomo": 0.0,
    "sgd": 0.0,  # without momentum, as transformers makes it
    "galore": 0.0,  # low-rank
    "apollo": 0.0,
    "lion_8bit": 1 + 4 / 256,
    "rmsprop_bnb_8bit": 1 + 4 / 256,
    "adamw_torch_4bit": 1 + 8 / 128,
    "8bit": 2 + 8 / 256,  # two moments of a byte, and an fp32 scale for each block of 256
    "lion": 4.0,
    "rmsprop": 4.0,
    "adagrad": 4.0,
}

_OPTIMIZER_PACKAGES = {  # by part of the name, as transformers imports them
    "bnb": "bitsandbytes",
    "paged": "bitsandbytes",
    "lion": "bitsandbytes",
    "ademamix": "bitsandbytes",
    "adamw_8bit": "bitsandbytes",
    "adamw_torch_4bit": "torchao",
    "adamw_torch_8bit": "torchao",
}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the training device at the moment of a step when most is held."""

    weights: int
    optimizer: int  # its state, and what its step takes where that is the peak
    reference: int  # a second model; 0 for an adapter, cached log-probs, or none
    casts: int  # copies of weights in autocast's dtype
    gradients: int
    head: int  # the head op's workspace and fp32 sums
    activations: int
    overhead: int  # outside PyTorch's allocator; 0 on a CPU

    @property
    def total(self) -> int:
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / MIB:,.0f}" for name, size in self.parts().items() if size >= MIB / 2)
        return f"about {self.total / MIB:,.0f} MiB (an estimate)" + (f": {parts}" if parts else "")


def trained_parameters(model: nn.Module) -> list[tuple[nn.Parameter, bool]]:
    """What the optimizer is given, and whether each is an embedding."""
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    return [(p, id(p) in embeddings) for p in model.parameters() if p.requires_grad]


def optimizer_state_bytes(name: str, trained: Iterable[tuple[nn.Parameter, bool]]) -> int:
    """What `optim=name` keeps on the device once it has stepped.

    Args:
        trained: the parameters, and whether each is an embedding, whose moments bitsandbytes keeps in fp32.
    """
    per_parameter = next((size for part, size in _STATE_BYTES.items() if part in name), None)
    total = 0.0
    for parameter, is_embedding in trained:
        if per_parameter is None:
            total += 2 * parameter.numel() * parameter.element_size()
        elif name == "adafactor" and parameter.dim() >= 2:
            total += 4 * (parameter.numel() // parameter.shape[-1] + parameter.numel() // parameter.shape[-2])
        elif name == "adafactor":
            total += 4 * parameter.numel()
        elif "8bit" in name and "paged" not in name and "torch" not in name and (is_embedding or _is_small(parameter)):
            total += (8 if "adam" in name else 4) * parameter.numel()
        else:
            total += per_parameter * parameter.numel()
    return int(total)


def _is_small(parameter: nn.Parameter) -> bool:
    return parameter.numel() < 4096  # bitsandbytes' min_8bit_size


def optimizer_step_bytes(name: str, trained: Iterable[nn.Parameter], on_gpu: bool) -> int:
    """What the optimizer's step takes for its length: the loop over all parameters at once that torch takes on a GPU
    keeps a root for each (`adamw_torch`), Adafactor the update of one parameter at a time, twice."""
    sizes = [4 * p.numel() for p in trained]
    if name == "adafactor":
        return 2 * max(sizes, default=0)
    is_foreach = on_gpu and name in ("adamw_torch", "adagrad", "rmsprop")
    return sum(sizes) if is_foreach else 0 if "fused" in name or "bnb" in name else max(sizes, default=0)


def check_memory_settings(args: Any) -> None:
    """Refuses what would fail when training starts, after data and reference have been prepared.

    Raises:
        ValueError: an optimizer whose package is not installed, or checkpoints offloaded from a device that has none.
    """
    name = str(getattr(args.optim, "value", args.optim))
    package = next((package for part, package in _OPTIMIZER_PACKAGES.items() if part in name), None)
    if package is not None and importlib.util.find_spec(package) is None:
        extra = "fastdpo[quant]" if package == "bitsandbytes" else package
        raise ValueError(f'optim={name!r} needs {package}, which is not installed: pip install "{extra}"')
    kwargs = _checkpointing_kwargs(args)
    if kwargs.get("offload") and args.device.type == "cpu":
        raise ValueError(f"activation_checkpointing_kwargs must not hold offload on a CPU, got {kwargs}")
    if kwargs.get("offload") and not args.gradient_checkpointing:
        raise ValueError(f"gradient_checkpointing must be on for activation_checkpointing_kwargs={kwargs}")


def _checkpointing_kwargs(args: Any) -> dict[str, Any]:
    names = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")  # the second until transformers 6
    return dict(next((kwargs for name in names if (kwargs := getattr(args, name, None))), {}))


def model_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers as they are stored, 4-bit ones packed."""
    return sum(tensor.numel() * tensor.element_size() for tensor in {*model.parameters(), *model.buffers()})


def estimate_step(
    dry: nn.Module, peak: StepPeak, *, optim: str, weight_bytes: int, reference_bytes: int = 0, on_gpu: bool
) -> MemoryEstimate:
    """The estimate for the model and the micro-batch behind a dry run.

    Args:
        dry, peak: the model given to `dry_step`, and what came back.
        weight_bytes, reference_bytes: of the two models.
    """
    trained = [p for p in dry.parameters() if p.requires_grad]
    state = optimizer_state_bytes(optim, trained_parameters(dry))
    gradients = sum(p.numel() * p.element_size() for p in trained)
    of_step = optimizer_step_bytes(optim, trained, on_gpu)
    overhead = CUDA_BYTES if on_gpu else 0
    if gradients + of_step > peak.total:
        return MemoryEstimate(weight_bytes, state + of_step, reference_bytes, 0, gradients, 0, 0, overhead)
    parts = {"casts": peak.casts, "gradients": peak.gradients, "head": peak.head, "activations": peak.activations}
    return MemoryEstimate(weight_bytes, state, reference_bytes, **parts, overhead=overhead)


def estimate_peak_memory(trainer: PackedTrainer) -> MemoryEstimate:
    """Bytes at the peak of a training step of the largest micro-batch to be expected."""
    args = trainer.args
    mode = fake_mode()
    dry = shape_only(trainer.model, mode)
    if args.gradient_checkpointing:
        kwargs = _checkpointing_kwargs(args)
        kwargs.pop("offload", None)
        every = {name: kwargs.pop(name) for name in ("every_n_layers",) if name in kwargs}
        bare = bare_model(dry)
        enable = getattr(bare, "activation_checkpointing_enable", None) or bare.gradient_checkpointing_enable
        enable(kwargs or None, **every)
    frozen: Any = getattr(getattr(trainer, "reference", None), "model", None)
    is_second = frozen is not None and bare_model(frozen) is not bare_model(trainer.model)
    impl = resolve_impl(args.impl, args.device, head_dtype(trainer.model, args))
    peak = dry_step(
        dry,
        largest_microbatch(trainer),
        mode,
        impl=impl if impl != "reference" else "tiled",
        varlen=any(name.startswith(("flash", "varlen")) for name in trainer.packing_check.backends),
        autocast=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None,
        accumulates=args.gradient_accumulation_steps > 1 or trainer.collator.max_tokens is not None,
    )
    return estimate_step(
        dry,
        peak,
        optim=str(getattr(args.optim, "value", args.optim)),
        weight_bytes=model_bytes(trainer.model),
        reference_bytes=model_bytes(frozen) if is_second else 0,
        on_gpu=args.device.type == "cuda",
    )


def largest_microbatch(trainer: PackedTrainer, num_draws: int = 200) -> RowShape:
    """The largest micro-batch of some randomly drawn batches, and of the longest row alone."""
    dataset: Any = known_rows(trainer.train_dataset)
    if dataset is None or len(dataset) == 0:
        return RowShape(((0, 1, 0, 0),), 1)
    draw = random.Random(0)
    size = min(trainer.args.per_device_train_batch_size, len(dataset))
    lengths = row_lengths(dataset)
    num_responses = lengths.per_row(np.ones_like(lengths.responses))
    copies = 1 if trainer.args.prefix_sharing else num_responses
    packed = copies * lengths.prompts + lengths.per_row(lengths.responses)
    longest = np.zeros_like(lengths.prompts)
    np.maximum.at(longest, lengths.rows, lengths.sequences)

    def num_tokens(rows: list[int]) -> int:
        return int(packed[rows].sum() if trainer.is_packed else num_responses[rows].sum() * longest[rows].max())

    batches = [draw.sample(range(len(dataset)), size) for _ in range(num_draws)]
    alone = int((packed if trainer.is_packed else num_responses * longest).argmax())
    candidates = [max(batches, key=num_tokens), [alone]]
    inputs = [trainer.collator([dataset[row] for row in rows]) for rows in candidates]
    parts = [PackedBatch(**part) for some in inputs for part in microbatches_of(some)]
    batch = max(parts, key=lambda part: part.input_ids.numel())
    shape = tuple(batch.input_ids.shape)
    if batch.is_packed:
        return RowShape(tuple(tuple(segment) for segment in batch.segments), len(batch.labels))  # type: ignore[misc]
    return RowShape((), len(batch.labels), (shape[0], shape[1]))


def planned_impl() -> str:
    """The head op of a GPU, or its twin where triton is not installed."""
    return "triton" if importlib.util.find_spec("triton") else "tiled"
