"""Attention over a packed row: every branch sees its prefix and itself, nothing else.

Registered with transformers' AttentionInterface as `fastdpo_packed`. A layer's queries, keys and values come in with
the layout of the row; a backend (`backends.py`) computes what comes out. Arguments that no backend implements are
refused, never ignored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdpo.data.varlen import varlen_layout
from fastdpo.modeling.attention.backends import ATTENTION_BACKENDS, BACKENDS, Observed, choose, observed
from fastdpo.modeling.attention.call import AttentionCall, PackedLayout, UnsupportedAttention
from fastdpo.modeling.attention.sdpa import masked_attention

__all__ = [
    "ATTENTION_BACKENDS",
    "BACKENDS",
    "PACKED_ATTENTION",
    "AttentionCall",
    "Observed",
    "PackedLayout",
    "UnsupportedAttention",
    "observed",
    "packed_attention",
    "register",
]

PACKED_ATTENTION = "fastdpo_packed"

# What models hand to their attention function besides the arguments below and that does not change its result.
_WITHOUT_EFFECT = {
    "cache_position",
    "is_causal",  # checked on its own
    "layer_idx",
    "logits_to_keep",
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_embeddings",
    "position_ids",
    "return_dict",
    "token_type_ids",
    "use_cache",
}


_NO_LAYOUT = PackedLayout((), varlen_layout(()), "mask")  # of layers that only the mask reaches


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    packed_layout: PackedLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function for transformers' AttentionInterface.

    Args:
        query: (1, num_heads, T, head_dim); key and value: (1, num_kv_heads, T, head_dim).
        attention_mask: (1, 1, T, T) bool, under the backend "mask" only.
        sliding_window: tokens a query sees, itself included.
        softcap: logits become `softcap * tanh(logits / softcap)` (Gemma 2).
        s_aux: (num_heads,) attention sinks, one more logit per row that takes probability and gives no value (gpt-oss).
        packed_layout: the branches of the row.
    Returns:
        (1, T, num_heads, head_dim), and None for the weights that are never built.
    Raises:
        ValueError: no layout was given, an argument that would change the result is not implemented, or the backend
            that was asked for cannot run the call.
    """
    unknown = [k for k, v in kwargs.items() if k not in _WITHOUT_EFFECT and v is not None and v is not False]
    if unknown or kwargs.get("is_causal") is False:
        what = ", ".join(unknown or ["is_causal=False"])
        raise ValueError(f"packed attention does not implement {what}, which {type(module).__name__} asks for")
    seen = observed.get() if not torch.compiler.is_compiling() else None
    if seen is not None:
        seen.windows.add(sliding_window)
        seen.num_calls += 1
    settings: dict[str, Any] = {
        "dropout": dropout,
        "scale": query.shape[-1] ** -0.5 if scaling is None else scaling,
        "softcap": softcap,
        "sinks": s_aux,
    }
    if packed_layout is None:
        is_row_mask = attention_mask is not None and attention_mask.dtype == torch.bool and attention_mask.dim() == 4
        if attention_mask is None or not is_row_mask or sliding_window is not None:
            raise ValueError(
                f"{type(module).__name__} called packed attention without packed_layout: the model does not hand extra"
                " arguments of its forward to its attention, or was called around its own forward"
            )
        call = AttentionCall(query, key, value, _NO_LAYOUT, window=None, **settings)
        return masked_attention(call, attention_mask), None
    if attention_mask is not None and packed_layout.backend != "mask":
        raise ValueError(f"packed attention does not take attention_mask, which {type(module).__name__} hands over")
    is_limited = sliding_window is not None and sliding_window < packed_layout.varlen.max_keys
    call = AttentionCall(query, key, value, packed_layout, window=sliding_window if is_limited else None, **settings)
    name, reason = choose(call)
    if seen is not None:
        seen.backends[name] = reason
    return BACKENDS[name].attend(call), None


def register() -> None:
    """Makes `packed_attention` known to transformers under PACKED_ATTENTION."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
