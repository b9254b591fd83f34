"""Attention over a packed row: every branch sees its prefix and itself, nothing else.

Registered with transformers' AttentionInterface as `fastdpo_packed`. The queries of a segment are one contiguous
slice of the row; its keys are the prefix's slice followed by its own, causal and aligned at the bottom right. No mask
over the whole row exists. This file holds the backend that runs anywhere: one scaled_dot_product_attention call per
segment.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


# set by the self-check: the sliding windows that a model hands to its attention, None for layers without
observed_windows: ContextVar[set[int | None] | None] = ContextVar("observed_windows", default=None)


class PackedLayout:
    """The segments of one packed row, with the masks that its layers share. Built once per forward."""

    def __init__(self, segments: tuple[tuple[int, int, int, int], ...]) -> None:
        self.segments = segments
        self._masks: dict[tuple[int, int, int | None, torch.device], Tensor] = {}

    def mask(self, num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
        """(num_queries, num_keys) bool, True where query i may see key j: the last query sees the last key.

        `window` counts the visible tokens including the query itself, as `sliding_window` does in model configs.
        """
        key = (num_queries, num_keys, window, device)
        if key not in self._masks:
            query = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
            distance = query - torch.arange(num_keys, device=device)[None, :]
            visible = distance >= 0
            self._masks[key] = visible if window is None else visible & (distance < window)
        return self._masks[key]


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
        sliding_window: tokens a query sees, itself included.
        softcap: logits become `softcap * tanh(logits / softcap)` (Gemma 2).
        s_aux: (num_heads,) attention sinks, one more logit per row that takes probability and gives no value (gpt-oss).
        packed_layout: segments of the row.
    Returns:
        (1, T, num_heads, head_dim), and None for the weights that are never built.
    Raises:
        ValueError: no layout was given, or an argument that would change the result is not implemented.
    """
    if packed_layout is None:
        raise ValueError(
            f"{type(module).__name__} called packed attention without packed_layout: the model does not hand extra"
            " arguments of its forward to its attention, or was called around its own forward"
        )
    unknown = [k for k, v in kwargs.items() if k not in _WITHOUT_EFFECT and v is not None and v is not False]
    if unknown or attention_mask is not None or kwargs.get("is_causal") is False:
        what = unknown or ["attention_mask" if attention_mask is not None else "is_causal=False"]
        raise ValueError(
            f"packed attention does not implement {', '.join(what)}, which {type(module).__name__} asks for"
        )

    observed = observed_windows.get()
    if observed is not None:
        observed.add(sliding_window)
    # split, not slices: the backward of a slice fills a tensor of the whole row with zeros, once per segment
    lengths = [end - start for start, end, _, _ in packed_layout.segments]
    queries, keys, values = (x.split(lengths, dim=2) for x in (query, key, value))
    first_at = {start: index for index, (start, _, _, _) in enumerate(packed_layout.segments)}
    outputs = []
    for index, (_, _, prefix_start, prefix_end) in enumerate(packed_layout.segments):
        q, k, v = queries[index], keys[index], values[index]
        if prefix_end > prefix_start:  # the prefix is the start of the segment that begins where it does
            first, num_shared = first_at[prefix_start], prefix_end - prefix_start
            k = torch.cat([keys[first][:, :, :num_shared], k], dim=2)
            v = torch.cat([values[first][:, :, :num_shared], v], dim=2)
        num_queries, num_keys = q.shape[2], k.shape[2]
        window = sliding_window if sliding_window is not None and sliding_window < num_keys else None
        if softcap is not None or s_aux is not None:
            visible = packed_layout.mask(num_queries, num_keys, window, q.device)
            outputs.append(_explicit_attention(q, k, v, visible, dropout, scaling, softcap, s_aux))
            continue
        is_plain_causal = num_queries == num_keys and window is None
        needs_mask = not is_plain_causal and not (num_queries == 1 and window is None)
        mask = packed_layout.mask(num_queries, num_keys, window, q.device) if needs_mask else None
        outputs.append(
            F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=is_plain_causal and num_queries > 1,
                scale=scaling,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _explicit_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """Softmax attention with what scaled_dot_product_attention lacks: a cap on the logits, and sinks."""
    num_groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(num_groups, dim=1) for x in (key, value))
    logits = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)  # (1, heads, Q, K)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.float().masked_fill(~mask, float("-inf"))
    if s_aux is not None:
        sinks = s_aux.float().reshape(1, -1, 1, 1).expand(logits.shape[0], -1, logits.shape[2], 1)
        logits = torch.cat([logits, sinks], dim=-1)
    weights = logits.softmax(-1)[..., : key.shape[2]].to(query.dtype)
    return F.dropout(weights, dropout) @ value


def register() -> None:
    """Makes `packed_attention` known to transformers under PACKED_ATTENTION."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
