"""LoRA on a model whose layers are cut over processes.

In: a cut model with a new adapter from PEFT. Out: the same adapter, whose weights start as on one process and are
cut like their layers: B by rows where the layer is, A by columns. Refuses adapters other than plain LoRA on linear
layers. PEFT alone would draw each process's part by itself, with another variance, and cannot adapt the LM head.
"""

from __future__ import annotations

import math
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from transformers import set_seed

from fastdpo.modeling.backbone import bare_model
from fastdpo.modeling.vocab_rows import is_dtensor

_STYLES = (None, "colwise", "rowwise", "colwise_gather_output")  # of layers with an adapter; None: not cut
_STARTS = (True, "gaussian")


def check_adapter_of_cut(model: Any, config: Any) -> None:
    """Refuses what cannot be cut, before PEFT changes the model.

    Raises:
        ValueError: the adapter is not plain LoRA.
    """
    what = f"with tensor_parallel_size={model.tp_size}"
    method = getattr(config.peft_type, "value", config.peft_type)
    if method != "LORA":
        raise ValueError(f"peft_config must be a LoraConfig {what}, got {method}")
    for name in ("modules_to_save", "trainable_token_indices", "target_parameters", "use_dora", "lora_bias"):
        if value := getattr(config, name, None):
            raise ValueError(f"{name} must be unset {what}, got {value!r}")
    if config.bias != "none":
        raise ValueError(f"bias must be 'none' {what}, got {config.bias!r}")
    if config.init_lora_weights not in _STARTS:
        raise ValueError(
            f"init_lora_weights must be one of {list(_STARTS)} {what}, got {config.init_lora_weights!r}: others read"
            " whole weights, or start from an adapter that is not zero"
        )


def cut_adapter(peft_model: Any, seed: int) -> None:
    """Draws the adapter's weights as one process would, and gives every process its part.

    Raises:
        ValueError: the adapter is on a layer that cannot be cut with it.
    """
    from peft.tuners.lora import Linear as LoraLinear
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

    bare, name = bare_model(peft_model), str(peft_model.active_adapter)
    mesh, start = bare._mesh_manager.get_mesh("tp"), peft_model.peft_config[name].init_lora_weights
    set_seed(seed)
    for path, layer in bare.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        style = bare.tp_plan.get(replace_layer_number_by_wildcard(path))
        if not isinstance(layer, LoraLinear) or style not in _STYLES:
            raise ValueError(
                f"target_modules must name linear layers with tensor_parallel_size={bare.tp_size}, got {path} (a"
                f" {type(layer).__name__} with the plan {style!r})"
            )
        a, b, base = layer.lora_A[name], layer.lora_B[name], layer.get_base_layer()
        a.in_features, b.out_features = base.in_features, base.out_features  # PEFT has set those of its part
        whole_a, whole_b = _drawn(base, layer.r[name], start)
        if style == "colwise_gather_output":
            ALL_PARALLEL_STYLES[style].install_forward(b, mesh)  # those of the others are PEFT's work
        _replace(a, whole_a, mesh if style == "rowwise" else None, 1)
        _replace(b, whole_b, mesh if style in ("colwise", "colwise_gather_output") else None, 0)
        for part in (a, b):
            _average_over_groups(part.weight, bare)


def _drawn(base: Any, r: int, start: Any) -> tuple[Tensor, Tensor]:
    """(r, in) and (out, r), in the order in which PEFT draws random numbers for a whole layer."""
    a, b = nn.Linear(base.in_features, r, bias=False).weight, nn.Linear(r, base.out_features, bias=False).weight
    if start is True:
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    else:
        nn.init.normal_(a, std=1 / r)
    nn.init.zeros_(b)
    return a.detach(), b.detach()


def _replace(linear: Any, whole: Tensor, mesh: Any, dim: int) -> None:
    """Gives a layer its weight: this process's part of it along `dim`, or all of it without a mesh."""
    from torch.distributed.tensor import Shard, distribute_tensor

    old = linear.weight
    new = whole.to(old.device, old.dtype)
    if mesh is not None:
        new = distribute_tensor(new, mesh, [Shard(dim)], src_data_rank=None)
    linear.weight = nn.Parameter(new, requires_grad=old.requires_grad)


def _average_over_groups(weight: Any, model: Any) -> None:
    """Averages the gradient of a part over the groups, which read different rows: FSDP2 knows only the layers' own
    weights, and transformers averages what is not cut."""
    groups = [model._mesh_manager.get_mesh(name).get_group() for name in ("dp_replicate", "fsdp")]
    groups = [group for group in groups if group.size() > 1]
    if not groups or not is_dtensor(weight) or not weight.requires_grad:
        return

    def average(weight: Any) -> None:
        for group in groups:  # of what earlier micro-batches left, which is an average already, the average is itself
            dist.all_reduce(weight.grad.to_local(), op=dist.ReduceOp.AVG, group=group)

    weight.register_post_accumulate_grad_hook(average)
