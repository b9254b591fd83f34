"""What FSDP2 and DeepSpeed must be told so that the numbers of a sharded run are those of one process.

In: the accelerator of a trainer. Out: its FSDP plugin with a mixed precision policy that does not round what the model
returns; whether processes must run equally many forwards and backwards; a context for a backward without a step; and
a reference that is divided as the policy will be, of which nothing stays gathered between its forwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule


def keep_outputs_whole(accelerator: Any) -> None:
    """Keeps summed log-probs and losses in fp32, which accelerate's policy for bf16 and fp16 would round.

    A response of -350 nats would be off by up to one nat in bf16. Layers still compute in the policy's param_dtype.
    """
    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    policy: Any = getattr(plugin, "mixed_precision_policy", None)
    if getattr(policy, "output_dtype", None) is not None:  # FSDP1's policy has no such field
        plugin.mixed_precision_policy = replace(policy, output_dtype=None)


def check_not_divided(model: nn.Module) -> None:
    """Raises ValueError for a model that DeepSpeed has divided while it was loaded."""
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError(
            "model must be whole before training, got weights that DeepSpeed has already divided (zero3_init_flag, or"
            " an HfDeepSpeedConfig that was made before the model): load it after DPOConfig, or give its name"
        )


def zero_stage(accelerator: Any) -> int:
    """DeepSpeed's stage: 1 divides the optimizer's state, 2 gradients too, 3 weights too; 0 without DeepSpeed."""
    plugin: Any = getattr(accelerator.state, "deepspeed_plugin", None)
    return int(getattr(plugin, "zero_stage", None) or 0)


def gathers_weights(accelerator: Any) -> bool:
    """Whether every forward gathers weights from all processes, so that all must run equally many."""
    return accelerator.distributed_type == DistributedType.FSDP or zero_stage(accelerator) == 3


def reduces_in_backward(accelerator: Any) -> bool:
    """Whether every backward reduces gradients over all processes, also one that is followed by another."""
    return accelerator.distributed_type == DistributedType.FSDP or zero_stage(accelerator) >= 2


def backward_without_step(accelerator: Any, model: nn.Module) -> AbstractContextManager[Any]:
    """Context for all but the last backward of a batch: gradients add up, and no weight changes."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return _within_accumulation(accelerator)
    return nullcontext() if reduces_in_backward(accelerator) else accelerator.no_sync(model)


@contextmanager
def _within_accumulation(accelerator: Any) -> Iterator[None]:
    """DeepSpeed's engine steps in the backward for which accelerate says that gradients are synchronized."""
    before = accelerator.sync_gradients
    accelerator.sync_gradients = False
    try:
        yield
    finally:
        accelerator.sync_gradients = before


def uses_fsdp2(accelerator: Any) -> bool:
    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    return accelerator.distributed_type == DistributedType.FSDP and plugin.fsdp_version == 2


def shard_reference(model: nn.Module, accelerator: Any) -> nn.Module:
    """A frozen reference, divided over the processes if FSDP2 or DeepSpeed's stage 3 will divide the policy.

    One that is quantized, or that accelerate has placed, stays as it is. One that is cut over processes was divided
    with the cut (`tensor_parallel`).
    """
    if isinstance(model, FSDPModule):
        return _gathered_in_forwards(model)
    is_placed = getattr(model, "hf_device_map", None) is not None or getattr(model, "is_quantized", False)
    if is_placed:
        return model
    if uses_fsdp2(accelerator):
        return _divided_by_fsdp2(model, accelerator)
    return _divided_by_zero(model, accelerator) if zero_stage(accelerator) == 3 else model


def _divided_by_fsdp2(model: nn.Module, accelerator: Any) -> nn.Module:
    """Divided by accelerate, in the units in which it divides a policy. Its plugin keeps the settings of the policy,
    which may have layers of another class."""
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    plugin: Any = accelerator.state.fsdp_plugin
    before = dict(vars(plugin))
    names = plugin.transformer_cls_names_to_wrap
    if names and not {*names} <= {type(module).__name__ for module in model.modules()}:
        plugin.transformer_cls_names_to_wrap = None  # then the model's own
    try:
        divided: Any = fsdp2_prepare_model(accelerator, model)
    finally:
        vars(plugin).clear()
        vars(plugin).update(before)
    return _gathered_in_forwards(divided).eval()


def _gathered_in_forwards(model: Any) -> Any:
    """accelerate and transformers leave head and norm whole until the backward of a policy; a reference has none."""
    model.set_reshard_after_forward(True)
    return model


def _divided_by_zero(model: nn.Module, accelerator: Any) -> nn.Module:
    import deepspeed

    engine, *_ = deepspeed.initialize(model=model, config=_config_without_training(accelerator))
    engine.eval()
    return engine


def _config_without_training(accelerator: Any) -> dict[str, Any]:
    """DeepSpeed's config for a model that only runs forward: how its weights are divided, and their dtype."""
    given: dict[str, Any] = accelerator.state.deepspeed_plugin.deepspeed_config
    zero = given["zero_optimization"]
    kept = {name: zero[name] for name in ("offload_param", "stage3_param_persistence_threshold") if name in zero}
    dtypes = {name: {"enabled": True} for name in ("bf16", "fp16") if given.get(name, {}).get("enabled") is True}
    set_ones = {name: value for name, value in kept.items() if value != "auto"}
    return {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3, **set_ones}, **dtypes}
