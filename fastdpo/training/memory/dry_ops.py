"""Replacements in a dry run for code that reads values: functions with the same allocations as the real ones.

In: tensors without storage, under a fake mode. Out: tensors of the right shape and dtype, and the tensors that the real
function saves for autograd. Covers the LM head's gradient in forward, attention over packed and padded rows, and
experts' matmuls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastdpo.modeling.attention.call import AttentionCall, PackedLayout
from fastdpo.modeling.attention.heads import to_heads, to_rows
from fastdpo.modeling.attention.sdpa import BranchSdpa
from fastdpo.modeling.attention.varlen import VarlenBackend
from fastdpo.modeling.sequence_group import SequenceGroup
from fastdpo.ops.eager import max_chunk_rows
from fastdpo.ops.engine import engine_of
from fastdpo.ops.head import joined_weight, padded
from fastdpo.ops.matmul import MAX_CAST_ELEMENTS, accumulator_dtype
from fastdpo.ops.tiled import choose_tiling


def grouped_mm(a: Tensor, b: Tensor, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Tensor:
    """Experts' matmuls, whose shape PyTorch only infers in bf16; `offs` splits the side without experts."""
    if a.dim() == b.dim() == 2:
        shape: tuple[int, ...] = (len(offs), a.shape[0], b.shape[1])
    elif a.dim() == b.dim() == 3:
        shape = (*a.shape[:2], b.shape[2])
    else:
        shape = (a.shape[-2], b.shape[-1])
    return torch.empty(shape, dtype=out_dtype or a.dtype)


class DryExperts(TorchDispatchMode):
    """Replaces experts' matmuls by `grouped_mm`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_grouped = func is torch.ops.aten._grouped_mm.default
        return (grouped_mm if is_grouped else func)(*args, **(kwargs or {}))


def head_loss(
    hidden_states: Tensor,
    weight: Tensor,
    adapter_weight: Tensor | None,
    dtype: torch.dtype,
    impl: str,
    workspace_bytes: int | None,
    largest_group: int,
) -> Tensor:
    """A scalar from (R, H + r) rows, the (V, H) weight and the (V, r) adapter, if there is one; without a gradient,
    only the operands are cast.

    Args:
        largest_group: rows of the group that has the most.
    """
    if torch.is_grad_enabled():
        loss: Tensor = _HeadAllocations.apply(
            hidden_states, weight, adapter_weight, dtype, impl, workspace_bytes, largest_group
        )
        return loss
    operands = hidden_states.to(dtype), joined_weight(weight, adapter_weight, dtype)
    return torch.empty((), dtype=accumulator_dtype(operands[0].dtype))


class _HeadAllocations(torch.autograd.Function):
    """The allocations of `fastdpo.ops.sequence_loss`: D in the workspace, fp32 sums, casts to the operands' dtype."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden_states, weight, adapter_weight, dtype, impl, workspace_bytes, largest_group
    ):
        engine = engine_of(impl)
        h, w = hidden_states.to(dtype), weight.to(dtype)
        ctx.has_adapter = adapter_weight is not None
        acc = accumulator_dtype(dtype)
        (R, width), (V, H) = h.shape, w.shape
        if ctx.has_adapter:
            weight, adapter = adapter_weight, adapter_weight.to(dtype)
            more = -adapter.shape[1] % engine.column_multiple
            if more:
                h, adapter = h.new_empty(R, width + more), adapter.new_empty(V, adapter.shape[1] + more)
        sums = [torch.empty(x.shape, dtype=acc) if x.requires_grad else None for x in (hidden_states, weight)]
        sums_bytes = 0 if sums[1] is None else sums[1].numel() * acc.itemsize
        rows = min(R, max_chunk_rows(w, engine, workspace_bytes, sums_bytes, group_rows=largest_group))
        d = torch.empty(rows, padded(V, engine.row_multiple), dtype=engine.grads_dtype(dtype))
        scaled = torch.empty(rows, weight.shape[1] if weight.requires_grad else 0, dtype=acc)
        if rows < largest_group and impl == "tiled":  # its log-probs come from a forward before its gradients
            tiling = choose_tiling(h, w, workspace_bytes)
            logits = torch.empty(tiling.block_rows, tiling.block_vocab, dtype=acc)
            block = torch.empty(tiling.block_vocab if dtype != acc else 0, H, dtype=acc)
            del logits, block
        upcast = torch.empty(min(V, MAX_CAST_ELEMENTS // H) if impl == "tiled" and dtype != acc else 0, H, dtype=acc)
        del d, scaled, upcast
        ctx.dtypes = hidden_states.dtype, weight.dtype
        ctx.save_for_backward(*sums)
        return torch.empty((), dtype=acc)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        grads = [
            None if x is None else x.mul_(grad) if x.dtype == dtype else torch.empty_like(x, dtype=dtype)
            for x, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (grads[0], *((None, grads[1]) if ctx.has_adapter else (grads[1], None)), None, None, None, None)


class _Attention(torch.autograd.Function):
    """The saved tensors of a memory-efficient attention: queries, keys, values, the output and a log-sum per query."""

    @staticmethod
    def forward(ctx: Any, query, key, value, mask):  # type: ignore[override]
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        lse = torch.empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, lse, mask)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return (*(torch.empty(x.shape, dtype=x.dtype) for x in ctx.saved_tensors[:3]), None)


class _DryAttention(TorchFunctionMode):
    """Replaces scaled_dot_product_attention, which needs a real device, by `_Attention`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key, value = args[:3]
        if torch.is_autocast_enabled("cpu"):
            query, key, value = (x.to(torch.get_autocast_dtype("cpu")) for x in (query, key, value))
        mask = kwargs.get("attn_mask")
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.empty(mask.shape, dtype=query.dtype)  # PyTorch's copy of the mask
        return _Attention.apply(query, key, value, mask)


class _DryVarlen(VarlenBackend):
    """Gathered keys as for flash-attn and torch's varlen_attn, and the tensors that their kernels save."""

    name = title = "dry run"

    def load(self) -> Callable[..., Any] | None:
        return None

    def _run(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> Tensor:
        output: Tensor = _Attention.apply(query, key, value, None)
        return output


def dry_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    packed_layout: PackedLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Replaces `packed_attention`, and a model's own masked attention over padded rows."""
    group = None if packed_layout is None else packed_layout.group
    if group is not None:
        query, key, value = to_heads(group, query, key, value)
    with _DryAttention():
        if packed_layout is None:
            S, _, L, _ = query.shape
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
            mask = query.new_empty(S, 1, L, L, dtype=torch.bool)
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).contiguous(), None
        key, value = packed_layout.continued(module, key, value)
        is_limited = sliding_window is not None and sliding_window < packed_layout.varlen.max_keys
        window = sliding_window if is_limited else None
        call = AttentionCall(query, key, value, packed_layout, 0.0, 1.0, window, softcap, s_aux)
        name = packed_layout.backend
        backend = _DryVarlen() if name == "varlen" else BranchSdpa(masked=name == "masked")
        output = backend.attend(call)
    return output if group is None else to_rows(group, output), None


class DryGroup(SequenceGroup):
    """Processes that compute a row together, without any: what comes from them has its shape."""

    def __init__(self, size: int) -> None:
        self.rank, self.size = 0, size

    def exchanged(self, blocks: Tensor) -> Tensor:
        return torch.empty_like(blocks)
