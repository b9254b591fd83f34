"""The peak memory of a run that has not started, from its settings, its models' configs and its data.

In: what a trainer would be made of, with configs in place of models. Out: a MemoryEstimate, by the dry runs that a
trainer makes before its first step. No weights are read. The self-check of packing is not run: packed batches are
assumed unless `packing` is "padded".
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.utils import DistributedType

from fastdpo.training.inputs.collator import collator_for
from fastdpo.training.inputs.streams import brings_ref_logps
from fastdpo.training.memory.estimate import MemoryEstimate, estimate_peak_memory, planned_impl
from fastdpo.training.memory.quantized import in_fewer_bits, quantize_shapes
from fastdpo.training.memory.weightless import weightless_model
from fastdpo.training.setup.reference import choose_reference, too_large_to_hold


@dataclass(frozen=True)
class PlannedRun:
    """What a run is made of."""

    args: Any  # DPOConfig
    config: Any  # of the model; of an adapter, its base
    tokenizer: Any
    train_dataset: Any  # prepared
    eval_dataset: Any = None  # prepared
    peft_config: Any = None
    bits: int | None = None  # 4 or 8 for a quantized base
    ref_config: Any = None  # of a separate reference
    ref_model: str | None = None  # its name
    num_processes: int = 1


def estimate_planned_run(run: PlannedRun, *, on_gpu: bool, memory: int | None = None) -> MemoryEstimate:
    """Bytes at the peak of the run on a GPU or on a CPU, whatever this machine has.

    Args:
        memory: of the GPU, in bytes, see `estimate_peak_memory`.
    """
    args: Any = _OnGpu(run.args) if on_gpu else run.args
    dtype = _dtype(args, run.config)
    model = weightless_model(run.config, dtype, run.peft_config)
    if run.bits is not None:
        asked = args.init_kwargs().get("dtype")  # in which the commands multiply too, if one is asked for
        quantize_shapes(model, run.bits, asked if isinstance(asked, torch.dtype) else torch.bfloat16)
    if run.peft_config is not None and args.gradient_checkpointing:
        model.enable_input_require_grads()
    evaluated = [] if run.eval_dataset is None else [run.eval_dataset]
    has_ref_logps = all(map(brings_ref_logps, [run.train_dataset, *evaluated]))
    mode, _ = choose_reference(
        args, model, run.ref_model, has_ref_logps, too_large=too_large_to_hold(args, model, run.ref_model)
    )
    reference = None
    if mode == "frozen":
        of = run.config if run.ref_config is None else run.ref_config
        reference = SimpleNamespace(model=weightless_model(of, dtype, None))
    is_packed = args.packing != "padded"
    collator = collator_for(args, run.tokenizer)
    collator.is_packed = is_packed
    is_parallel = run.num_processes > 1
    planned: Any = SimpleNamespace(
        args=args,
        model=model,
        reference=reference,
        collator=collator,
        is_packed=is_packed,
        packing_check=SimpleNamespace(backends=("varlen",) if on_gpu else ("sdpa",)),
        train_dataset=run.train_dataset,
        eval_dataset=run.eval_dataset,
        accelerator=SimpleNamespace(distributed_type=DistributedType.MULTI_GPU if is_parallel else DistributedType.NO),
    )
    impl = planned_impl() if on_gpu and args.impl == "auto" else None
    saved, largest = (0, 0) if run.bits is None else in_fewer_bits(model, run.bits)
    memory = None if memory is None else memory + saved - largest  # the estimate is of the base in full precision
    estimate = estimate_peak_memory(planned, impl=impl, memory=memory)
    return replace(estimate, weights=estimate.weights - saved, casts=estimate.casts + largest)


def _dtype(args: Any, config: Any) -> torch.dtype:
    asked = args.init_kwargs().get("dtype", torch.float32)
    if isinstance(asked, torch.dtype):
        return asked
    found: torch.dtype = (config.dtype or torch.float32) if asked == "auto" else getattr(torch, asked)
    return found


class _OnGpu:
    """The settings as a GPU would have them, on a machine that may have none."""

    device = torch.device("cuda")

    def __init__(self, args: Any) -> None:
        self._args = args

    def __getattr__(self, name: str) -> Any:
        return getattr(self._args, name)
