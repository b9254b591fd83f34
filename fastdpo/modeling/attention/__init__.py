"""Attention over a packed row: every branch attends only to its prefix and to itself.

Registered with transformers' AttentionInterface as `fastdpo_packed`. In: a layer's queries, keys and values, and the
layout of the row. Out: the attention output, computed by a backend (`backends.py`). Arguments that no backend
implements are refused, never ignored.
"""

from __future__ import annotations

from contextlib import nullcontext
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdpo.data.batches.varlen import varlen_layout
from fastdpo.modeling.attention.backends import ATTENTION_BACKENDS, BACKENDS, Observed, can_do_without, choose, observed
from fastdpo.modeling.attention.call import AttentionCall, PackedLayout, UnsupportedAttention
from fastdpo.modeling.attention.heads import own_heads, to_heads, to_rows
from fastdpo.modeling.attention.masks import MASKS, carried, masks_of, only_picked, packed_mask
from fastdpo.modeling.attention.prefix import Prefix, PrefixRefused
from fastdpo.modeling.attention.sdpa import masked_attention
from fastdpo.modeling.positions import scaled_by_position

__all__ = [
    "ATTENTION_BACKENDS",
    "BACKENDS",
    "MASKS",
    "PACKED_ATTENTION",
    "PACKED_ATTENTIONS",
    "PACKED_ATTENTION_WITH_MASKS",
    "AttentionCall",
    "Observed",
    "PackedLayout",
    "Prefix",
    "PrefixRefused",
    "UnsupportedAttention",
    "can_do_without",
    "masks_of",
    "observed",
    "packed_attention",
    "register",
    "stands_in",
]

PACKED_ATTENTION = "fastdpo_packed"
PACKED_ATTENTION_WITH_MASKS = "fastdpo_packed_with_masks"  # for models that want one, see `masks.py`
PACKED_ATTENTIONS = (PACKED_ATTENTION, PACKED_ATTENTION_WITH_MASKS)

# Further arguments that models pass to their attention function and that do not change its result.
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


# While True, no attention is computed: the search for layers that run one sequence at a time
stands_in: ContextVar[bool] = ContextVar("stands_in", default=False)
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
    indices: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function for transformers' AttentionInterface.

    Args:
        query: (1, num_heads, T, head_dim); key and value: (1, num_kv_heads, T, head_dim).
        attention_mask: a mask that carries the layout (`masks.py`), a bias (1, heads, T, T) that a layer made from such
            a mask, or, with the backend "mask", (1, 1, T, T) bool.
        sliding_window: number of tokens that a query sees, including itself.
        softcap: logits become `softcap * tanh(logits / softcap)` (Gemma 2).
        s_aux: (num_heads,) attention sinks: an extra logit per row that takes probability but adds no value (gpt-oss).
        packed_layout: the branches of the row.
        indices: (1, T, k) rows of the keys that a sparse layer selected for each query (DeepSeek V3.2).
    Returns:
        (1, T, num_heads, head_dim), and None for the attention weights, which are never built.
    Raises:
        ValueError: the layout is missing, an argument that affects the result is not implemented, or the requested
            backend cannot run the call.
    """
    if not torch.compiler.is_compiling() and stands_in.get():
        return _stand_in(query, value), None
    if key.shape[2] != query.shape[2]:
        raise ValueError(
            f"packed attention needs one key for each row, got {key.shape[2]} keys for {query.shape[2]} rows from"
            f" {type(module).__name__}, which attends to more or other things than tokens"
        )
    unknown = [k for k, v in kwargs.items() if k not in _WITHOUT_EFFECT and v is not None and v is not False]
    if unknown or kwargs.get("is_causal") is False:
        what = ", ".join(unknown or ["is_causal=False"])
        raise ValueError(f"packed attention does not implement {what}, which {type(module).__name__} needs")
    if indices is not None:
        attention_mask = only_picked(attention_mask, indices)
    about, chunk = carried(attention_mask), None
    is_bias = about is None and attention_mask is not None and attention_mask.is_floating_point()
    if about is not None:
        packed_layout, attention_mask, chunk = about.layout, None, about.chunk
        windows = [window for window in (sliding_window, about.window) if window is not None]
        sliding_window = min(windows, default=None)
    seen = observed.get() if not torch.compiler.is_compiling() else None
    if seen is not None:
        seen.windows |= {sliding_window, *([f"chunks of {chunk}"] if chunk is not None else [])}
        seen.num_calls += 1
        seen.num_masks += about is not None or is_bias
    settings: dict[str, Any] = {
        "dropout": dropout,
        "scale": query.shape[-1] ** -0.5 if scaling is None else scaling,
        "softcap": softcap,
        "sinks": s_aux,
    }
    if packed_layout is not None:
        query = scaled_by_position(module, query, packed_layout)
    group = None if packed_layout is None else packed_layout.group
    if group is not None:
        if attention_mask is not None:
            raise ValueError(
                f"sequence_parallel_size must be 1 for this model: {type(module).__name__} passes a mask of its own"
            )
        query, key, value = to_heads(group, query, key, value)
        settings["sinks"] = None if s_aux is None else own_heads(group, s_aux)
    num_rows, wants_masks = query.shape[2], _has_masks(module)
    if wants_masks and is_bias:
        assert attention_mask is not None
        if attention_mask.shape[-2:] != (num_rows, num_rows):
            raise ValueError(f"packed attention does not take the attention_mask of {type(module).__name__}")
        call = AttentionCall(query, key, value, packed_layout or _NO_LAYOUT, window=None, **settings)
        return masked_attention(call, attention_mask.to(query.dtype)).contiguous(), None
    if packed_layout is None:
        is_row_mask = attention_mask is not None and attention_mask.dtype == torch.bool and attention_mask.dim() == 4
        if attention_mask is None or not is_row_mask or sliding_window is not None:
            raise ValueError(
                f"packed_layout must be given, got None from {type(module).__name__}: the model does not pass extra"
                " forward arguments to its attention, or its own forward was bypassed"
            )
        call = AttentionCall(query, key, value, _NO_LAYOUT, window=None, **settings)
        return masked_attention(call, attention_mask).contiguous(), None
    if attention_mask is not None and packed_layout.backend != "mask":
        raise ValueError(f"packed attention does not take the attention_mask that {type(module).__name__} passes")
    key, value = packed_layout.continued(module, key, value)
    longest = packed_layout.varlen.max_keys
    window = sliding_window if sliding_window is not None and sliding_window < longest else None
    chunk = chunk if chunk is not None and chunk < longest else None
    call = AttentionCall(query, key, value, packed_layout, window=window, chunk=chunk, **settings)
    name, reason = choose(call)
    with nullcontext() if seen is None else seen.running(name, reason, call, sliding_window):
        output = BACKENDS[name].attend(call)
    # stock functions return a row's heads contiguously, and some layers `view` them as one
    return (output if group is None else to_rows(group, output)).contiguous(), None


def _stand_in(query: Tensor, value: Tensor) -> Tensor:
    """Numbers of each row alone in the shape of its attention, for a trial that only asks which layers call it."""
    if (seen := observed.get()) is not None:
        seen.num_calls += 1
    return F.pad(query, (0, value.shape[-1] - query.shape[-1])).transpose(1, 2).contiguous()


def _has_masks(module: nn.Module) -> bool:
    """Whether the layer's model gets masks, so that a bias from the layer was made from such a mask."""
    config = getattr(module, "config", None)
    return getattr(config, "_attn_implementation", None) == PACKED_ATTENTION_WITH_MASKS


def register() -> None:
    """Registers `packed_attention` with transformers under both names, and its masks under the second."""
    from transformers import AttentionInterface, AttentionMaskInterface

    for name in PACKED_ATTENTIONS:
        AttentionInterface.register(name, packed_attention)
    AttentionMaskInterface.register(PACKED_ATTENTION_WITH_MASKS, packed_mask)
