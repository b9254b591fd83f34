"""Merges the partial sums of a row's vocabulary tiles into its log-prob, lse and statistics, eq. (4) to (8).

In: the output of `partials_kernel`, (num_tiles, T) fp32 each. Out: one number per row and result. Ignored rows become
0, rows with a label outside the vocabulary nan
(also ELSEWHERE: only another process knows its log-prob; lse is right).
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastdpo.types import IGNORE_INDEX

EXP_FLOOR = tl.constexpr(-1000.0)  # exp of it is 0, and 0 * EXP_FLOOR is 0 where 0 * -inf would be nan
IGNORED = tl.constexpr(IGNORE_INDEX)
MERGE_ROWS, MERGE_TILES = 32, 32  # rows and vocabulary tiles that one step reads
RESULTS = (
    *("logps", "lse_whole", "lse_rest", "lse", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    "max_logit",  # for a vocabulary that is cut over processes
)


class Partials(NamedTuple):
    """eq. (3) for every tile. Statistics that are not requested share the buffer of `max` and are never accessed."""

    label_logit: Tensor  # (T,) fp32, written where the label lies in the vocabulary
    max: Tensor  # (num_tiles, T) fp32, and so are all below
    sumexp: Tensor
    sum_z_exp: Tensor  # for entropy
    sum_sq_exp: Tensor  # for log_sum_sq_probs
    sum_z: Tensor  # for mean_logits


def statistics(outputs: tuple[str, ...]) -> dict[str, bool]:
    """The extra sums that the requested results need, as the kernels' switches."""
    return {
        "WITH_ENTROPY": "entropy" in outputs,
        "WITH_SQUARES": "log_sum_sq_probs" in outputs,
        "WITH_MEAN": "mean_logits" in outputs,
    }


@triton.jit(
    do_not_specialize=["T", "num_tiles"],
    do_not_specialize_on_alignment=["labels_ptr", "sumexp_ptr", "sum_z_exp_ptr", "sum_sq_exp_ptr", "sum_z_ptr"],
)
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
    max_logit_ptr,
    T,
    V,
    num_tiles,
    WITH_ENTROPY: tl.constexpr,
    WITH_SQUARES: tl.constexpr,
    WITH_MEAN: tl.constexpr,
    WITH_TOP1: tl.constexpr,
    WITH_LSE: tl.constexpr,
    WITH_MAX: tl.constexpr,
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
    if WITH_MAX:
        tl.store(max_logit_ptr + t, tl.where(keep, row_max, 0.0), mask=in_rows)


def merge(
    partials: Partials,
    labels: Tensor,  # (T,) int64, contiguous
    values: dict[str, Tensor],  # filled: name out of RESULTS to (T,)
    num_vocab: int,
) -> None:
    num_tiles, T = partials.max.shape
    merge_kernel[(triton.cdiv(T, MERGE_ROWS),)](
        labels,
        *partials,
        *(values.get(name, values["logps"]) for name in RESULTS),
        T,
        num_vocab,
        num_tiles,
        **statistics(tuple(values)),
        WITH_TOP1="is_top1" in values,
        WITH_LSE="lse" in values,
        WITH_MAX="max_logit" in values,
        ROWS=MERGE_ROWS,
        TILES=MERGE_TILES,
        num_warps=4,
    )
