"""The sizes of a model that memory, traffic and time of a sharded run depend on.

In: a model without weights, as `weightless_model` makes it, with or without an adapter. Out: ModelSizes, sums over its
parameters. The layers are the modules that the model names as those that must not be split, which FSDP gathers one at a
time. Refuses a model that names none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from fastdpo.modeling.backbone import bare_model
from fastdpo.training.setup.model_kinds import text_part


@dataclass(frozen=True)
class Weights:
    """Numbers of weights, and their bytes as stored."""

    count: int
    trained: int
    num_bytes: int
    trained_bytes: int

    def __add__(self, other: Weights) -> Weights:
        return Weights(*(a + b for a, b in zip(self._parts(), other._parts(), strict=True)))

    def __sub__(self, other: Weights) -> Weights:
        return Weights(*(a - b for a, b in zip(self._parts(), other._parts(), strict=True)))

    def _parts(self) -> tuple[int, int, int, int]:
        return self.count, self.trained, self.num_bytes, self.trained_bytes


_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # names in configs
NOTHING = Weights(0, 0, 0, 0)


@dataclass(frozen=True)
class ModelSizes:
    layers: Weights  # all layers together
    largest_layer: Weights
    embedding: Weights  # tied: also the head
    head: Weights  # nothing if tied
    rest: Weights  # norms outside layers
    linear: int  # weights of linear layers and experts, which tensor parallelism divides
    active: float  # weights of layers that a token goes through; fewer than all with experts
    num_layers: int
    hidden_size: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    can_tensor_parallel: bool  # transformers has a plan for it

    @property
    def all(self) -> Weights:
        return self.layers + self.embedding + self.head + self.rest


def model_sizes(model: nn.Module) -> ModelSizes:
    """Raises:
    ValueError: the model does not name its layers.
    """
    bare: Any = bare_model(model)
    names = getattr(bare, "_no_split_modules", None) or ()
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise ValueError(
            f"model must name its layers in _no_split_modules, got {type(bare).__name__}, which names none"
        )
    config = text_part(bare.config)
    heads = getattr(config, "num_attention_heads", None)
    num_heads = heads if isinstance(heads, int) else 1  # without attention, or different in each layer
    kv_heads = getattr(config, "num_key_value_heads", None)
    embedding, head = bare.get_input_embeddings(), bare.get_output_embeddings()
    of_layers, of_embedding, of_head = (_weights(*modules) for modules in (layers, [embedding], [head]))
    if _base(embedding).weight is _base(head).weight:
        of_head = NOTHING
    rest = _weights(model) - (of_layers + of_embedding + of_head)
    matrices = sum(p.numel() for layer in layers for p in layer.parameters() if p.dim() > 1)
    experts = sum(p.numel() for layer in layers for p in layer.parameters() if p.dim() > 2)
    num_experts = next((n for name in _EXPERTS if (n := getattr(config, name, None))), 1)
    per_token = getattr(config, "num_experts_per_tok", None) or num_experts
    return ModelSizes(
        layers=of_layers,
        largest_layer=max((_weights(layer) for layer in layers), key=lambda part: part.num_bytes),
        embedding=of_embedding,
        head=of_head,
        rest=rest,
        linear=matrices,
        active=matrices - experts * (1 - per_token / num_experts),
        num_layers=len(layers),
        hidden_size=config.hidden_size,
        vocab_size=_base(head).weight.shape[0],
        num_heads=num_heads,
        num_kv_heads=kv_heads if isinstance(kv_heads, int) else num_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
        can_tensor_parallel=bool(getattr(bare.config, "base_model_tp_plan", None)),
    )


def _base(layer: Any) -> Any:
    """Without PEFT's adapter."""
    return getattr(layer, "base_layer", layer)


def _weights(*modules: nn.Module) -> Weights:
    found = list({id(p): p for module in modules for p in module.parameters()}.values())
    trained = [p for p in found if p.requires_grad]
    return Weights(
        sum(p.numel() for p in found),
        sum(p.numel() for p in trained),
        sum(p.numel() * p.element_size() for p in found),
        sum(p.numel() * p.element_size() for p in trained),
    )
