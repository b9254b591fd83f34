"""The two backends that run on any device, in any dtype, with all features: scaled_dot_product_attention per branch,
and one call over the whole row with a boolean (T, T) mask.

Per branch, the queries are one contiguous slice of the row, and the keys are the prefix's slice followed by the
branch's own, causal and aligned at the bottom right. On a CPU, one call sees the branch and another its prefix, so that
no mask exists: as a tensor of queries x keys it would be the largest of a long pair. The mask over the whole row costs
T x T bits and logits, masked or not; it serves layers that only pass on a mask, and as a reference.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastdpo.modeling.attention.call import AttentionCall

MAX_GRADIENT_BYTES = 2**22  # of a branch's queries, keys and values, beside those of the row, if heads can be split


class BranchSdpa:
    """One call per branch; on a CPU two for a branch with a prefix, without a mask."""

    title = "one SDPA call per branch"

    def __init__(self, masked: bool = False) -> None:
        self.masked = masked  # whether to run on a CPU as on other devices

    def refusal(self, call: AttentionCall) -> str | None:
        return None

    @torch.compiler.disable  # a loop over branches, which would be compiled anew for every batch
    def attend(self, call: AttentionCall) -> Tensor:
        if not self.masked and _needs_no_mask(call):
            operands = (x.to(call.dtype) for x in (call.query, call.key, call.value))
            output: Tensor = _Branches.apply(*operands, call.layout.segments, call.scale)
            return output
        layout = call.layout
        # split instead of slices: the backward of each slice would fill a tensor of the whole row with zeros
        lengths = [end - start for start, end, _, _ in layout.segments]
        queries = call.query.split(lengths, dim=2)
        lengths[0] += layout.num_before  # keys of the tokens before the row go with its first branch
        keys, values = (x.split(lengths, dim=2) for x in (call.key, call.value))
        first_at = {start: index for index, (start, _, _, _) in enumerate(layout.segments)}
        first_at[0] = 0
        outputs = []
        for index, (start, _, prefix_start, prefix_end) in enumerate(layout.segments):
            q, k, v = queries[index], keys[index], values[index]
            # the prefix is the start of the segment that begins where it does
            if prefix_end > prefix_start and start > layout.num_before:
                first, num_shared = first_at[prefix_start], prefix_end - prefix_start
                k = torch.cat([keys[first][:, :, :num_shared], k], dim=2)
                v = torch.cat([values[first][:, :, :num_shared], v], dim=2)
            num_queries, num_keys = q.shape[2], k.shape[2]
            window = call.window if call.window is not None and call.window < num_keys else None
            chunk = call.chunk if call.chunk is not None and call.chunk < num_keys else None
            is_whole = window is None and chunk is None
            if call.softcap is not None or call.sinks is not None:
                mask = layout.branch_mask(num_queries, num_keys, window, q.device, chunk)
                outputs.append(explicit_attention(q, k, v, mask, call))
            elif is_whole and num_queries in (1, num_keys):
                outputs.append(_sdpa(q, k, v, None, call, is_causal=num_queries > 1))
            else:
                mask = layout.branch_mask(num_queries, num_keys, window, q.device, chunk)
                outputs.append(_sdpa(q, k, v, mask, call))
        return torch.cat(outputs, dim=2).transpose(1, 2)


def _needs_no_mask(call: AttentionCall) -> bool:
    """Whether each branch sees all of its prefix and causally itself, on a device where PyTorch gives lse."""
    limits = (call.window, call.chunk, call.softcap, call.sinks)
    operands = (call.query, call.key, call.value)
    fits = len({x.shape[-1] for x in operands}) == 1 and all(x.stride(-1) == 1 for x in operands)
    return call.query.device.type == "cpu" and all(x is None for x in limits) and call.dropout == 0.0 and fits


class _Branches(torch.autograd.Function):
    """Attention of every branch to its prefix and to itself; (1, T, num_heads, D).

    lse over both makes the weights of each a part of one softmax, in forward and in backward. Only the operands, the
    output and lse are kept, and no keys are copied. Where gradients of a branch are large, backward makes them a few
    heads at once. Keys may be more than queries: those of the tokens before the row come first.
    """

    @staticmethod
    def forward(ctx: Any, query, key, value, segments, scale):  # type: ignore[override]
        num_before = key.shape[2] - query.shape[2]
        assert segments[-1][1] == key.shape[2], "the operator does not take empty slices"
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        output, sums = query.new_empty(query.transpose(1, 2).shape), []
        for start, end, prefix_start, prefix_end in segments:
            own, prefix = slice(start, end), slice(prefix_start, prefix_end)
            rows = slice(start - num_before, end - num_before)
            q = query[:, :, rows]
            found, lse = attend(q, key[:, :, own], value[:, :, own], 0.0, True, scale=scale)
            if prefix_end > prefix_start:
                of_prefix, prefix_lse = attend(q, key[:, :, prefix], value[:, :, prefix], 0.0, False, scale=scale)
                share = torch.sigmoid(lse - prefix_lse)[..., None]  # of the branch itself, (1, num_heads, queries, 1)
                found = torch.lerp(of_prefix.to(share.dtype), found.to(share.dtype), share)
                lse = torch.logaddexp(lse, prefix_lse)
            output[:, rows] = found.transpose(1, 2)
            sums.append(lse)
        ctx.segments, ctx.scale = segments, scale
        ctx.save_for_backward(query, key, value, output, torch.cat(sums, dim=2))
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        query, key, value, output, lse = ctx.saved_tensors
        grads = of_query, of_key, of_value = [torch.empty_like(x) for x in (query, key, value)]
        attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        num_before = key.shape[2] - query.shape[2]
        for gradient in (of_key, of_value):
            gradient[:, :, :num_before].zero_()  # no branch has them for its own
        for heads, shared in _heads_at_once(query, key, ctx.segments):
            of_rows = [x[:, heads] for x in (grad.transpose(1, 2), query, output.transpose(1, 2), lse)]
            k, v = key[:, shared], value[:, shared]
            of_q, of_k, of_v = of_query[:, heads], of_key[:, shared], of_value[:, shared]
            for start, end, prefix_start, prefix_end in ctx.segments:
                own, prefix = slice(start, end), slice(prefix_start, prefix_end)
                rows = slice(start - num_before, end - num_before)
                g, q, out, sums = (x[:, :, rows] for x in of_rows)
                rest = out, sums, 0.0
                found = attend_backward(g, q, k[:, :, own], v[:, :, own], *rest, True, scale=ctx.scale)
                of_q[:, :, rows], of_k[:, :, own], of_v[:, :, own] = found
                if prefix_end > prefix_start:  # the start of an earlier branch
                    found = attend_backward(g, q, k[:, :, prefix], v[:, :, prefix], *rest, False, scale=ctx.scale)
                    of_q[:, :, rows] += found[0]
                    of_k[:, :, prefix] += found[1]
                    of_v[:, :, prefix] += found[2]
                del found  # before the next branch makes its own
        return *grads, None, None


def _heads_at_once(query: Tensor, key: Tensor, segments: Any) -> Iterator[tuple[slice, slice]]:
    """Heads of the queries, and those of the keys that they share, that backward takes at once: all, or where the
    gradients of the longest branch would be large, as few as take the threads no longer (a thread runs a head)."""
    num_heads, num_shared, size = query.shape[1], key.shape[1], query.shape[3] * query.element_size()
    group, num_threads = num_heads // num_shared, torch.get_num_threads()
    longest = max(end - start for start, end, _, _ in segments)
    fewest = min(max(MAX_GRADIENT_BYTES // (longest * size * (group + 2)), 1), num_shared)

    def rounds(at_once: int) -> int:
        whole, rest = divmod(num_shared, at_once)
        return whole * -(-at_once * group // num_threads) + -(-rest * group // num_threads)

    at_once = min(range(fewest, num_shared + 1), key=rounds)
    for start in range(0, num_shared, at_once):
        shared = slice(start, min(start + at_once, num_shared))
        yield slice(shared.start * group, shared.stop * group), shared


class RowMask:
    """One call with a mask over the whole row."""

    title = "one SDPA call with a mask over the whole row"

    def refusal(self, call: AttentionCall) -> str | None:
        return None

    def attend(self, call: AttentionCall) -> Tensor:
        return masked_attention(call, call.layout.row_mask(call.window, call.chunk))


def masked_attention(call: AttentionCall, mask: Tensor) -> Tensor:
    """`mask` broadcasts to (1, num_heads, T, T): True where a query may see a key, or a bias on the logits."""
    if call.softcap is not None or call.sinks is not None:
        return explicit_attention(call.query, call.key, call.value, mask, call).transpose(1, 2)
    return _sdpa(call.query, call.key, call.value, mask, call).transpose(1, 2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, call: AttentionCall, is_causal: bool = False) -> Tensor:
    is_grouped = call.is_grouped
    if is_grouped and mask is not None and q.device.type == "cuda":
        # with a mask and grouped heads no fused kernel runs there, and scores are built
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        is_grouped = False
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=call.dropout,
        is_causal=is_causal,
        scale=call.scale,
        enable_gqa=is_grouped,
    )


def explicit_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, call: AttentionCall) -> Tensor:
    """Softmax attention with a softcap on the logits and sinks, which scaled_dot_product_attention lacks."""
    num_groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(num_groups, dim=1) for x in (key, value))
    logits = query @ key.transpose(2, 3) * call.scale  # (1, heads, Q, K)
    if call.softcap is not None:
        logits = call.softcap * torch.tanh(logits / call.softcap)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask
    if call.sinks is not None:
        sinks = call.sinks.to(logits.dtype).reshape(1, -1, 1, 1).expand(logits.shape[0], -1, logits.shape[2], 1)
        logits = torch.cat([logits, sinks], dim=-1)
    weights = logits.softmax(-1)[..., : key.shape[2]].to(value.dtype)
    return F.dropout(weights, call.dropout) @ value
