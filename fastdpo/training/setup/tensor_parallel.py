"""Tensor parallelism: every process of a group holds a part of each layer, cut by the plan of the model's class.

In: `tensor_parallel_size`, and a model that is whole on each process, or was cut while it was loaded. Out: the cut
model; the head op then works on the rows of the LM head that a process has. With more processes than
`tensor_parallel_size`, the groups read different rows and shard each part among them with FSDP2. transformers cuts,
gathers and shards; this module adds what training needs beyond that. Refuses models that have no plan or do not divide.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule

from fastdpo.modeling.backbone import bare_model
from fastdpo.training.settings.engine import EngineConfig

_SUMMED = "replicated_with_grad_allreduce"  # style of weights that each process uses for its own heads


def distributed_options(args: EngineConfig) -> dict[str, Any]:
    """Arguments of from_pretrained with which each process loads only its part of a model.

    Raises:
        ValueError: `tensor_parallel_size` does not fit the number of processes or other settings.
    """
    if args.tensor_parallel_size == 1:
        return {}
    check_sizes(args)
    return {"distributed_config": _distributed_config(args)}


def check_sizes(args: EngineConfig) -> None:
    """Refuses settings that do not go with tensor parallelism, before anything is loaded.

    Raises:
        ValueError: see the messages.
    """
    size = args.tensor_parallel_size
    if args.world_size % size != 0:
        raise ValueError(
            f"tensor_parallel_size must divide the number of processes, got {size} on {args.world_size}: start"
            f" {size} processes or a multiple, with torchrun or --num_processes"
        )
    for name in ("fsdp", "deepspeed"):
        if value := getattr(args, name):
            raise ValueError(
                f"{name} must be off with tensor_parallel_size={size}, got {value!r}: with more processes than that,"
                " the parts of the model are sharded over the groups without it"
            )
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":  # of accelerate's launcher: args.fsdp is unset
        raise ValueError(
            f"tensor_parallel_size must be 1 with an accelerate config for FSDP, got {size}: start with"
            " --accelerate_config tp; with more processes than that, the parts of the model are sharded over the groups"
        )
    if args.save_strategy != "no" and not args.save_only_model:
        raise ValueError(
            f"save_only_model must be True (or save_strategy 'no') with tensor_parallel_size={size}, got False:"
            " transformers cannot resume the optimizer of such a run"
        )
    if args.sequence_parallel_size > 1:
        raise ValueError(
            f"sequence_parallel_size must be 1 with tensor_parallel_size={size}, got {args.sequence_parallel_size}"
        )
    if args.max_tokens_per_microbatch == "auto":
        raise ValueError(
            f"max_tokens_per_microbatch must be a number with tensor_parallel_size={size}, got 'auto': processes that"
            " find different limits would wait for each other"
        )
    for name in ("load_best_model_at_end", "resume_from_checkpoint", "torch_compile", "tile_rows"):
        if value := getattr(args, name):
            raise ValueError(f"{name} must be off with tensor_parallel_size={size}, got {value!r}")
    if not _is_supported():
        import transformers

        raise ValueError(
            f"tensor_parallel_size must be 1 with transformers {transformers.__version__}, got {size}: its Trainer does"
            " not train models that are cut at load time; install transformers 5.23 or newer"
        )


def check_not_resumed(checkpoint: Any) -> None:
    """Raises:
    ValueError: a run on a cut model is to go on from a checkpoint.
    """
    if checkpoint is not None:
        raise ValueError(
            f"resume_from_checkpoint must be None with tensor_parallel_size, got {str(checkpoint)!r}: start from its"
            " weights as a new run"
        )


def is_cut(model: Any) -> bool:
    """Whether the processes of a group hold parts of the model."""
    return (getattr(bare_model(model), "tp_size", None) or 1) > 1


def cut_over_processes(model: Any, args: EngineConfig) -> Any:
    """The model, cut over the processes of each group as `tensor_parallel_size` asks; a cut model stays as it is.

    Raises:
        ValueError: the model cannot be cut, or was cut over another number of processes.
    """
    bare = bare_model(model)
    given = getattr(bare, "tp_size", None) or 1
    if given > 1 and args.tensor_parallel_size == 1:
        args.tensor_parallel_size = given
    size = args.tensor_parallel_size
    if size == 1:
        return model
    check_sizes(args)
    if given > 1 and given != size:
        raise ValueError(f"tensor_parallel_size must be {given}, over which the model was cut, got {size}")
    if given == 1:
        if bare is not model:
            raise ValueError(
                f"model must be without an adapter if tensor_parallel_size is {size}, got a {type(model).__name__}:"
                " merge_and_unload() it, and pass peft_config for a new adapter"
            )
        _check_can_cut(bare, size)
        _cut(bare.to(args.device), _distributed_config(args))
    _check_divides(bare, size)
    _sum_gradients_before_they_are_added(bare)
    return model


def copy_of_cut(model: Any) -> Any:
    """A second model with the same weights and the same cut. deepcopy would give layers that run the first one's.

    Raises:
        ValueError: the model has an adapter.
    """
    bare = bare_model(model)
    if bare is not model:
        raise ValueError(
            "reference must be 'adapter' or 'cached' for an adapter on a model that is cut over processes, got 'frozen'"
        )
    reshard(bare)
    devices = {p.device for p in bare.parameters()}
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        other = type(bare)(copy.deepcopy(bare.config)).to(bare.dtype)
    _cut(other, bare.config.distributed_config, bare._mesh_manager)
    other.to_empty(device=next(iter(devices)))
    other.tie_weights()
    with torch.no_grad():
        for ours, theirs in zip(_tensors(bare), _tensors(other), strict=True):
            theirs.copy_(ours)
    _sum_gradients_before_they_are_added(other)
    return other


def reshard(model: nn.Module) -> None:
    """Frees the weights that FSDP2 keeps gathered after a forward: those of the head and the final norm.

    An optimizer that is made meanwhile would train the gathered copies, which nothing reads.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _is_supported() -> bool:
    from transformers import Trainer

    return hasattr(Trainer, "_sync_replicated_trainable_parameters")


def _distributed_config(args: EngineConfig) -> Any:
    from transformers.distributed import DistributedConfig

    size = args.tensor_parallel_size
    return DistributedConfig(tp_size=size, fsdp_size=args.world_size // size)


def _cut(model: Any, config: Any, meshes: Any = None) -> None:
    """Cuts a whole model in place, each process taking its own part of what it holds."""
    if meshes is None:
        config, _, meshes = type(model).prepare_distribute_model(config)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for name in tied:  # each is cut under its own name, and tied again
        module, _, own = name.rpartition(".")
        owner = model.get_submodule(module)
        setattr(owner, own, nn.Parameter(getattr(owner, own).detach(), requires_grad=getattr(owner, own).requires_grad))
    type(model).maybe_distribute_model(model, config, meshes)
    if tied:
        model.tie_weights()


def _check_can_cut(model: Any, size: int) -> None:
    kind = type(model).__name__
    if getattr(model, "is_quantized", False) or getattr(model, "hf_device_map", None) is not None:
        raise ValueError(
            f"model must be whole and not quantized if tensor_parallel_size is {size}, got a {kind} that is quantized"
            " or has a device_map"
        )
    if not getattr(model, "supports_tp_plan", False):
        raise ValueError(f"tensor_parallel_size must be 1 for {kind}, which has no tp_plan, got {size}")


def _check_divides(model: Any, size: int) -> None:
    config = model.config.get_text_config()
    for name in ("num_attention_heads", "num_key_value_heads", "moe_intermediate_size"):
        number = getattr(config, name, None)
        if isinstance(number, int) and number % size != 0:
            raise ValueError(
                f"tensor_parallel_size must divide {name}, which is {number} in {type(model).__name__}, got {size}"
            )


def _sum_gradients_before_they_are_added(model: Any) -> None:
    """Replaces transformers' sum over processes of the gradient of weights that each process uses for its own heads.

    Its hook sums `.grad`, which holds the sums of earlier micro-batches: they would be counted once per process again.
    """
    from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard

    names = {name for name, style in (model.tp_plan or {}).items() if style == _SUMMED}
    group = model._mesh_manager.get_mesh("tp").get_group() if names else None
    for name, module in model.named_modules():
        if replace_layer_number_by_wildcard(name) in names:
            for parameter in module.parameters(recurse=False):
                parameter._post_accumulate_grad_hooks = None
            module.forward = _with_summed_gradients(module, group)


def _with_summed_gradients(module: nn.Module, group: Any) -> Any:
    def forward(*args: Any, **kwargs: Any) -> Any:
        own = dict(module._parameters)
        used = {name: None if p is None else _SumOfGradients.apply(p, group) for name, p in own.items()}
        module._parameters.update(used)
        try:
            return type(module).forward(module, *args, **kwargs)
        finally:
            module._parameters.update(own)

    return forward


class _SumOfGradients(torch.autograd.Function):
    """The tensor itself; its gradient is the sum over the processes of the group."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:  # type: ignore[override]
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        summed = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed, group=ctx.group)
        return summed, None
