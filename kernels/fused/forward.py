"""Forward of the head op: partial softmax sums per (row, vocabulary tile), then a small kernel that merges them.

In: hidden states, head weight, labels. Out: logps, split lse and the statistics asked for, each (T,) fp32. Stateless
tiles: no atomics, no locks, the same bits every time; partials take 4 bytes per row, tile and statistic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdpo.kernels.launch import MERGE_ROWS, MERGE_TILES, Blocks, device_blocks, scratch
from fastdpo.kernels.logits import program_tile, scale_logits, tile_dot
from fastdpo.types import IGNORE_INDEX

EXP_FLOOR = tl.constexpr(-1000.0)  # exp of it is 0, and 0 * EXP_FLOOR is 0 where 0 * -inf would be nan
IGNORED = tl.constexpr(IGNORE_INDEX)


@triton.jit
def partials_kernel(
    hidden_ptr,  # (T, H)
    weight_ptr,  # (V, H)
    bias_ptr,  # (V,) or unused
    labels_ptr,  # (T,) int64
    label_logit_ptr,  # (T,) fp32; only rows whose label lies in the vocabulary are written
    max_ptr,  # (num_tiles, T) fp32, and so are all below
    sumexp_ptr,
    sum_z_exp_ptr,
    sum_sq_exp_ptr,
    sum_z_ptr,
    T,
    V,
    H,
    stride_ht,
    stride_hh,
    stride_wv,
    stride_wh,
    logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    WITH_SQUARES: tl.constexpr,
    WITH_MEAN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP_T: tl.constexpr,
):
    """eq. (3) for one tile."""
    row_block, tile = program_tile(T, V, BLOCK_T, BLOCK_V, GROUP_T)

    t = row_block.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    v = tile.to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_rows, in_vocab = t < T, v < V
    t_safe, v_safe = tl.minimum(t, T - 1), tl.minimum(v, V - 1)
    acc = tile_dot(
        hidden_ptr, weight_ptr, t_safe, v_safe, H, stride_ht, stride_hh, stride_wv, stride_wh, BLOCK_T, BLOCK_V, BLOCK_H
    )
    z, _ = scale_logits(acc, bias_ptr, v_safe, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP)

    label = tl.load(labels_ptr + t_safe)  # (BLOCK_T,)
    label_column = label - tile.to(tl.int64) * BLOCK_V
    here = (label_column >= 0) & (label_column < BLOCK_V) & (label < V)
    is_label = tl.arange(0, BLOCK_V)[None, :] == label_column[:, None]
    tl.store(label_logit_ptr + t, tl.sum(tl.where(is_label, z, 0.0), axis=1), mask=in_rows & here)

    if WITH_MEAN:
        sum_z = tl.sum(tl.where(in_vocab[None, :], z, 0.0), axis=1)
    z = tl.where(in_vocab[None, :], z, -float("inf"))
    z_max = tl.max(z, axis=1)
    shifted = z - tl.where(z_max == -float("inf"), 0.0, z_max)[:, None]
    e = tl.exp(shifted)  # (BLOCK_T, BLOCK_V), 0 beyond the vocabulary
    out = tile.to(tl.int64) * T + t
    tl.store(max_ptr + out, z_max, mask=in_rows)
    tl.store(sumexp_ptr + out, tl.sum(e, axis=1), mask=in_rows)
    if WITH_ENTROPY:
        tl.store(sum_z_exp_ptr + out, tl.sum(tl.maximum(shifted, EXP_FLOOR) * e, axis=1), mask=in_rows)
    if WITH_SQUARES:
        tl.store(sum_sq_exp_ptr + out, tl.sum(e * e, axis=1), mask=in_rows)
    if WITH_MEAN:
        tl.store(sum_z_ptr + out, sum_z, mask=in_rows)


@triton.jit
def merge_kernel(
    labels_ptr,  # (T,) int64
    label_logit_ptr,  # (T,) fp32
    max_ptr,  # (num_tiles, T) fp32, and so are the next four
    sumexp_ptr,
    sum_z_exp_ptr,
    sum_sq_exp_ptr,
    sum_z_ptr,
    logps_ptr,  # (T,) fp32, and so are the rest
    lse_whole_ptr,
    lse_rest_ptr,
    lse_ptr,  # this and what follows: only where asked for
    entropy_ptr,
    log_sum_sq_probs_ptr,
    mean_logits_ptr,
    is_top1_ptr,  # (T,) int8
    T,
    V,
    num_tiles,
    WITH_ENTROPY: tl.constexpr,
    WITH_SQUARES: tl.constexpr,
    WITH_MEAN: tl.constexpr,
    WITH_TOP1: tl.constexpr,
    WITH_LSE: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
):
    """eq. (4) to (8): two passes over the partials of ROWS rows, first for the largest maximum, then for the sums."""
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    in_rows = t < T
    row_max = tl.full((ROWS,), -float("inf"), tl.float32)
    for start in range(0, num_tiles, TILES):
        tile = start + tl.arange(0, TILES).to(tl.int64)
        mask = (tile < num_tiles)[:, None] & in_rows[None, :]
        maxima = tl.load(max_ptr + tile[:, None] * T + t[None, :], mask=mask, other=-float("inf"))  # (TILES, ROWS)
        row_max = tl.maximum(row_max, tl.max(maxima, axis=0))
    shift = tl.where(row_max == -float("inf"), 0.0, row_max)

    sumexp = tl.zeros((ROWS,), tl.float32)
    sum_z_exp = tl.zeros((ROWS,), tl.float32)
    sum_sq_exp = tl.zeros((ROWS,), tl.float32)
    sum_z = tl.zeros((ROWS,), tl.float32)
    for start in range(0, num_tiles, TILES):
        tile = start + tl.arange(0, TILES).to(tl.int64)
        offsets = tile[:, None] * T + t[None, :]
        mask = (tile < num_tiles)[:, None] & in_rows[None, :]
        moved = tl.maximum(tl.load(max_ptr + offsets, mask=mask, other=-float("inf")) - shift[None, :], EXP_FLOOR)
        decay = tl.exp(moved)
        tile_sumexp = tl.load(sumexp_ptr + offsets, mask=mask, other=0.0)
        sumexp += tl.sum(decay * tile_sumexp, axis=0)
        if WITH_ENTROPY:
            tile_sum_z_exp = tl.load(sum_z_exp_ptr + offsets, mask=mask, other=0.0)
            sum_z_exp += tl.sum(decay * (tile_sum_z_exp + moved * tile_sumexp), axis=0)
        if WITH_SQUARES:
            sum_sq_exp += tl.sum(decay * decay * tl.load(sum_sq_exp_ptr + offsets, mask=mask, other=0.0), axis=0)
        if WITH_MEAN:
            sum_z += tl.sum(tl.load(sum_z_ptr + offsets, mask=mask, other=0.0), axis=0)

    label = tl.load(labels_ptr + t, mask=in_rows, other=IGNORED)
    keep = label != IGNORED
    in_vocab = (label >= 0) & (label < V)
    label_logit = tl.load(label_logit_ptr + t, mask=in_rows & in_vocab, other=float("nan"))
    log_sum = tl.log(tl.where(in_rows, sumexp, 1.0))
    row_max = tl.where(in_rows, row_max, 0.0)
    tl.store(logps_ptr + t, tl.where(keep, (label_logit - row_max) - log_sum, 0.0), mask=in_rows)
    lse = row_max + log_sum
    whole = tl.floor(lse + 0.5)
    tl.store(lse_whole_ptr + t, tl.where(keep, whole, 0.0), mask=in_rows)
    tl.store(lse_rest_ptr + t, tl.where(keep, (row_max - whole) + log_sum, 0.0), mask=in_rows)
    if WITH_LSE:
        tl.store(lse_ptr + t, tl.where(keep, lse, 0.0), mask=in_rows)
    if WITH_ENTROPY:
        tl.store(entropy_ptr + t, tl.where(keep, log_sum - sum_z_exp * tl.exp(-log_sum), 0.0), mask=in_rows)
    if WITH_SQUARES:
        tl.store(
            log_sum_sq_probs_ptr + t,
            tl.where(keep, tl.log(tl.where(in_rows, sum_sq_exp, 1.0)) - 2 * log_sum, 0.0),
            mask=in_rows,
        )
    if WITH_MEAN:
        tl.store(mean_logits_ptr + t, tl.where(keep, sum_z / V, 0.0), mask=in_rows)
    if WITH_TOP1:
        tl.store(is_top1_ptr + t, (keep & (label_logit >= row_max)).to(tl.int8), mask=in_rows)


def fused_forward(
    hidden_states: Tensor,  # (T, H) fp16, bf16 or fp32
    lm_head_weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (T,) int64
    logit_scale: float,
    softcap: float | None,
    outputs: tuple[str, ...],
    blocks: Blocks | None = None,
) -> dict[str, Tensor]:
    """logps, lse_whole, lse_rest and `outputs`, each (T,)."""
    (T, H), V = hidden_states.shape, lm_head_weight.shape[0]
    block_t, block_v, block_h, num_warps, num_stages = blocks or device_blocks(hidden_states)
    num_tiles = triton.cdiv(V, block_v)
    values = {
        name: hidden_states.new_empty(T, dtype=torch.float32) for name in ("logps", "lse_whole", "lse_rest", *outputs)
    }
    if "is_top1" in values:
        values["is_top1"] = hidden_states.new_empty(T, dtype=torch.int8)
    if T > 0:
        wants = {
            "WITH_ENTROPY": "entropy" in outputs,
            "WITH_SQUARES": "log_sum_sq_probs" in outputs,
            "WITH_MEAN": "mean_logits" in outputs,
        }
        labels, bias = labels.contiguous(), None if bias is None else bias.contiguous()
        label_logit = scratch((T,), hidden_states, torch.float32)
        sums = scratch((2 + sum(wants.values()), num_tiles, T), hidden_states, torch.float32)
        spare = iter(
            sums[2:]
        )  # partials that nobody asked for share the first buffer, which they neither read nor write
        partials = [sums[0], sums[1], *(next(spare) if wanted else sums[0] for wanted in wants.values())]
        partials_kernel[(triton.cdiv(T, block_t) * num_tiles,)](
            hidden_states,
            lm_head_weight,
            labels if bias is None else bias,
            labels,
            label_logit,
            *partials,
            T,
            V,
            H,
            *hidden_states.stride(),
            *lm_head_weight.stride(),
            logit_scale,
            1.0 if softcap is None else softcap,
            HAS_BIAS=bias is not None,
            HAS_SOFTCAP=softcap is not None,
            **wants,
            BLOCK_T=block_t,
            BLOCK_V=block_v,
            BLOCK_H=block_h,
            GROUP_T=8,
            num_warps=num_warps,
            num_stages=num_stages,
        )
        results = ("logps", "lse_whole", "lse_rest", "lse", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
        merge_kernel[(triton.cdiv(T, MERGE_ROWS),)](
            labels,
            label_logit,
            *partials,
            *(values.get(name, values["logps"]) for name in results),
            T,
            V,
            num_tiles,
            **wants,
            WITH_TOP1="is_top1" in outputs,
            WITH_LSE="lse" in outputs,
            ROWS=MERGE_ROWS,
            TILES=MERGE_TILES,
            num_warps=4,
        )
    if "is_top1" in values:
        values["is_top1"] = values["is_top1"].bool()
    return values
