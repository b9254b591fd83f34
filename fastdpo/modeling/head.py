"""The LM head of a causal LM as arguments of the head op: weight, bias, logit scale, softcap, adapter.

Under tensor parallelism these are this process's rows of the head, with the process group that holds the others.
Refuses heads that are not a plain linear layer, with or without a LoRA adapter, because the op would compute other
logits than theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastdpo.modeling.vocab_rows import VocabRows, local, own_rows
from fastdpo.ops.head import joined_weight


class LowRank(NamedTuple):
    """One LoRA adapter of the head: it adds `scaling * B(A(dropout(hidden)))` to the logits' argument."""

    dropout: Any
    a: Any  # linear, H to r
    b: Any  # linear, r to V
    scaling: float

    def columns(self, rows: Tensor) -> Tensor:
        """(T, r) input of B's weight, from hidden states (T, H)."""
        return (self.a(self.dropout(rows.to(self.a.weight.dtype))) * self.scaling).to(rows.dtype)


class LMHead(NamedTuple):
    """`softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)`, without the tanh if softcap is None.

    LoRA widens both factors of the product and keeps the weight unchanged: with u = scaling * hidden @ A.T,
    hidden @ W.T + u @ B.T = [hidden, u] @ [W, B].T.
    """

    weight: Tensor  # (V, H); (rows of this process, H) if `cut`
    bias: Tensor | None  # (V,)
    logit_scale: float
    softcap: float | None
    low_ranks: tuple[LowRank, ...] = ()
    cut: VocabRows | None = None  # over the processes of a tensor-parallel group; None: the head is whole

    def local(self) -> LMHead:
        """The head on this process: plain tensors, its own rows if the head is cut over the vocabulary.

        Raises:
            ValueError: the head is cut in another way.
        """
        weight, bias, cut = own_rows(self.weight, self.bias)
        return self._replace(weight=weight, bias=bias, cut=cut)

    def operands(self, rows: Tensor, *, split: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """The factors of the head's product, from hidden states (T, H): (T, H + r), and the weight, whole or split.

        Split means `weight` and the (V, r) columns that the adapter trains (None without an adapter); whole means one
        copy, (V, H + r). A trained weight is always whole.
        """
        if not self.low_ranks:
            return rows, self.weight, None
        wide = torch.cat([rows, *(low_rank.columns(rows) for low_rank in self.low_ranks)], 1)
        columns = [local(low_rank.b.weight) for low_rank in self.low_ranks]
        adapter_weight = torch.cat(columns, 1)[: self.weight.shape[0]]
        if split and not self.weight.requires_grad:
            return wide, self.weight, adapter_weight
        device_type = rows.device.type
        autocast = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
        return wide, joined_weight(self.weight, adapter_weight, autocast), None


# config field -> its factor on the logits, with the model families that have it
_LOGIT_SCALES = {
    "logit_scale": lambda value: value,  # Cohere
    "logits_scaling": lambda value: 1.0 / value,  # Granite, MiniCPM3
    "lm_head_multiplier": lambda value: value,  # Falcon-H1
    "output_multiplier": lambda value: value,
    "logits_mup_width_multiplier": lambda value: 1.0 / value,  # Inkling
}
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma; RecurrentGemma; xLSTM
_MULTIPLIES_LOGITS_SCALING = {"hyperclovax"}
_ATTRIBUTES_OF_ADAPTERS = ("base_layer", "modules_to_save", "token_adapter")  # of the modules that PEFT puts in place


def lm_head(model: Any) -> LMHead:
    """The head of a bare causal LM, with its active adapter.

    Raises:
        ValueError: the output embedding is not a plain linear layer, or the op does not support its adapter.
    """
    layer = model.get_output_embeddings()
    weight, bias, low_ranks = _parts(layer)
    if weight is None or weight.dim() != 2:
        raise ValueError(f"model must have an LM head with a (V, H) weight, {type(model).__name__} has {layer!r}")
    if weight.dtype.itemsize < 2 or not weight.dtype.is_floating_point:
        raise ValueError(f"the LM head must hold fp32, fp16 or bf16 weights, {type(model).__name__} has {weight.dtype}")
    config = model.config.get_text_config()
    num_ids = num_output_ids(model)
    if num_ids < weight.shape[0]:
        weight, bias = weight[:num_ids], None if bias is None else bias[:num_ids]
    scale = 1.0
    for field, factor in _LOGIT_SCALES.items():
        value = getattr(config, field, None)
        if isinstance(value, int | float):
            multiplies = field == "logits_scaling" and config.model_type in _MULTIPLIES_LOGITS_SCALING
            scale *= value if multiplies else factor(value)
    return LMHead(
        weight=weight,
        bias=bias,
        logit_scale=scale,
        softcap=next((cap for name in _SOFTCAPS if (cap := getattr(config, name, None)) is not None), None),
        low_ranks=low_ranks,
    )


def whole_shape(weight: Any) -> torch.Size:
    """The shape of a weight, also of one that DeepSpeed has divided over processes: its own is (0,)."""
    shape: torch.Size = getattr(weight, "ds_shape", weight.shape)
    return shape


def num_output_ids(model: Any) -> int:
    """How many ids the logits of a bare model cover: some models cut off the rows that pad the head's weight."""
    num_rows = whole_shape(model.get_output_embeddings().weight)[0]
    unpadded = getattr(model.config.get_text_config(), "unpadded_vocab_size", None)  # Inkling
    return min(num_rows, unpadded) if isinstance(unpadded, int) else num_rows


def _parts(layer: Any) -> tuple[Tensor | None, Tensor | None, tuple[LowRank, ...]]:
    """Weight, bias and active LoRA adapters of the head, as in PEFT's forward of the layer."""
    if not any(hasattr(layer, name) for name in _ATTRIBUTES_OF_ADAPTERS):
        if layer is None:
            return None, None, ()
        with resident(layer):  # references keep its tensors alive for the caller
            return _scaled_by_id(layer, getattr(layer, "weight", None)), getattr(layer, "bias", None), ()
    from peft.tuners.lora import Linear as LoraLinear
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    names = [] if layer.disable_adapters else list(layer.active_adapters)
    if isinstance(layer, ModulesToSaveWrapper):
        is_on = bool(names) and names[0] in layer.modules_to_save
        return _parts(layer.modules_to_save[names[0]] if is_on else layer.original_module)
    if isinstance(layer, TrainableTokensWrapper):
        layer = layer.token_adapter
    is_tokens, is_lora = isinstance(layer, TrainableTokensLayer), isinstance(layer, LoraLinear)
    if not (is_tokens or is_lora) or not isinstance(layer.get_base_layer(), nn.Linear):
        raise ValueError(
            f"peft_config must put no adapter but LoRA on the LM head, got {type(layer).__module__}: remove 'lm_head'"
            " from target_modules, train the head whole by modules_to_save=['lm_head'], or use LoRA"
        )
    if layer.merged and layer.disable_adapters:
        layer.unmerge()  # as its forward does
    weight, bias, _ = _parts(layer.get_base_layer())
    assert weight is not None  # a linear layer's
    names = [] if layer.merged else names
    if is_tokens:
        if names and bias is not None:
            raise ValueError("trainable_token_indices must be None if an LM head with a bias is tied to the embedding")
        return (layer.get_merged_weights(names) if names else weight), bias, ()
    names = [name for name in names if name in layer.lora_A]
    variants = [name for name in names if name in layer.lora_variant]
    if variants:
        raise ValueError(
            f"peft_config must put plain LoRA on the LM head, got {type(layer.lora_variant[variants[0]]).__name__}:"
            " remove 'lm_head' from target_modules, or train the head whole by modules_to_save=['lm_head']"
        )
    low_ranks = tuple(
        LowRank(layer.lora_dropout[name], layer.lora_A[name], layer.lora_B[name], layer.scaling[name]) for name in names
    )
    for low_rank in low_ranks:
        if low_rank.b.bias is not None:  # lora_bias
            added = (low_rank.b.bias * low_rank.scaling).to(weight.dtype)
            bias = added if bias is None else bias + added
    return weight, bias, low_ranks


def inside(layer: nn.Module, function: Callable[..., Any], *tensors: Tensor) -> Any:
    """`function(*tensors)`, which reads the layer's weights, inside the layer's own call if its weights are sharded.

    FSDP2 and DeepSpeed ZeRO-3 gather a layer's weights in hooks around its call. They may shard the head on its own, so
    the model's own call does not gather it.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return function(*tensors)
    called = {module for name, module in layer.named_modules() if "lora_A" in name.split(".")}  # by `LowRank.columns`
    for module in layer.modules():
        if module not in called and _is_sharded(module):
            function = _in_call_of(module, function)
    return function(*tensors)


def shards_weights(model: nn.Module) -> bool:
    """Whether FSDP2 or DeepSpeed ZeRO-3 shards a model's weights."""
    return dist.is_available() and dist.is_initialized() and any(map(_is_sharded, model.modules()))


def _is_sharded(module: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule) or any(hasattr(p, "ds_id") for p in module.parameters(recurse=False))


def _in_call_of(module: nn.Module, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*tensors: Tensor) -> Any:
        before = vars(module).get("forward")
        module.forward = function
        try:
            return module(*tensors)
        finally:
            if before is None:
                del module.forward
            else:
                module.forward = before

    return call


def _scaled_by_id(layer: Any, weight: Tensor | None) -> Tensor | None:
    """The weight of a head without a bias that scales the logit of every id by a number of its own (Dory)."""
    scale = getattr(layer, "logit_scale", None)
    if weight is None or not isinstance(scale, Tensor) or scale.shape != weight.shape[:1] or layer.bias is not None:
        return weight
    factors = scale.float() * getattr(layer, "logit_scale_factor", 1.0)
    return (weight * factors[:, None]).to(weight.dtype)


def resident(module: nn.Module) -> Any:
    """Context manager in which the module's own weights are on its device, even if accelerate offloads them."""
    if not hasattr(module, "_hf_hook"):
        return nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module)


def execution_device(model: nn.Module) -> torch.device:
    """The device for a bare model's inputs, even if accelerate offloads its weights."""
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    device = next((device for device in devices if device is not None), None)
    return next(model.parameters()).device if device is None else torch.device(device)
