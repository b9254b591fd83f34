"""Linear layers in 4 and 8 bits, as bitsandbytes has them: their bytes, and stand-ins for them in a dry run.

In: a model whose layers are quantized, or one whose layers will be. bitsandbytes itself is not needed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastdpo.modeling.backbone import bare_model

LAYERS = {4: "Linear4bit", 8: "Linear8bitLt"}  # by bits; PEFT's layers around them have the same names
BYTES = {4: 0.5 + 4 / 64, 8: 1.0}  # of a weight; in 4 bits with a scale for each block of 64


def is_quantized(module: nn.Module) -> bool:
    """Whether it is a layer of bitsandbytes."""
    return type(module).__name__ in LAYERS.values() and not hasattr(module, "base_layer")


def scale_bytes(weight: Any) -> int:
    """Bytes of the scales of a 4-bit weight: one per block, and their own if quantized too."""
    state, total = getattr(weight, "quant_state", None), 0
    while state is not None:
        total += state.absmax.numel() * state.absmax.element_size()
        state = getattr(state, "state2", None)
    return total


def largest_copy(model: nn.Module) -> int:
    """Bytes of the temporary copy of the largest quantized layer during a product, in the dtype of that."""
    return _largest_copy(module for module in model.modules() if is_quantized(module))


def in_fewer_bits(model: Any, bits: int) -> tuple[int, int]:
    """Bytes that the layers will save once they are quantized, and those of the largest one's temporary copy."""
    layers = _to_quantize(model)
    saved = sum(layer.weight.numel() * (layer.weight.element_size() - BYTES[bits]) for layer in layers)
    return int(saved), _largest_copy(layers)


def _largest_copy(layers: Iterable[Any]) -> int:
    return max((_compute_dtype(x).itemsize * x.in_features * x.out_features for x in layers), default=0)


def quantize_shapes(model: Any, bits: int, compute_dtype: torch.dtype) -> None:
    """Makes the layers of a model without numbers run as quantized ones, with weights of 16 bits.

    Args:
        compute_dtype: in which layers of 4 bits multiply.
    """
    for layer in _to_quantize(model):
        layer.to(torch.bfloat16)
        layer.__class__ = DryQuantizedLinear
        layer.bits, layer.compute_dtype = bits, compute_dtype


def _to_quantize(model: Any) -> list[Any]:
    """Linear layers of the base; neither an adapter's nor the head is quantized."""
    head = bare_model(model).get_output_embeddings()
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and "lora_" not in name
    ]


class DryQuantizedLinear(nn.Linear):
    """Stands in for a quantized layer, which returns the dtype of its input, also under autocast. Only on a CPU does a
    layer of 8 bits return autocast's."""

    bits = 4
    compute_dtype = torch.bfloat16  # in which layers of 4 bits multiply
    is_on_cpu = False

    def forward(self, input: Tensor) -> Tensor:
        if self.bits == 4:
            product: Tensor = _Product.apply(input.to(self.compute_dtype), self.out_features, self.compute_dtype, False)
            return product.to(input.dtype)
        device, dtype = input.device.type, input.dtype
        if self.is_on_cpu and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        product = _Product.apply(input, self.out_features, dtype, True)
        return product


class _Product(torch.autograd.Function):
    """A product with a frozen weight. The input, if it is kept, is not saved as others' tensors are, so that
    checkpointing does not give it up: bitsandbytes' does the same."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, out_features: int, dtype: torch.dtype, keeps_input: bool) -> Tensor:
        ctx.shape, ctx.dtype = x.shape, x.dtype
        ctx.kept = x if keeps_input else None
        return x.new_empty(*x.shape[:-1], out_features, dtype=dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return grads[0].new_empty(ctx.shape, dtype=ctx.dtype), None, None, None


def dry_quantized(layer: Any) -> DryQuantizedLinear:
    """The stand-in of a layer of bitsandbytes, with a weight of 16 bits."""
    dry = DryQuantizedLinear(layer.in_features, layer.out_features, layer.bias is not None, dtype=torch.bfloat16)
    dry.bits = 4 if type(layer).__name__ == LAYERS[4] else 8
    dry.compute_dtype, dry.is_on_cpu = _compute_dtype(layer), layer.weight.device.type == "cpu"
    dry.requires_grad_(False)
    return dry


def _compute_dtype(layer: Any) -> torch.dtype:
    """The dtype in which a layer multiplies; a 4-bit layer without one takes that of its first input."""
    found: torch.dtype | None = getattr(layer, "compute_dtype", None)
    return torch.bfloat16 if found is None else found
