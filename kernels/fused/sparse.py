"""Backward of the head op over the kept tiles: all other tiles are neither recomputed nor multiplied.

In: the inputs of forward, its lse, the row factors c of eq. (10), and the kept (row block, vocabulary tile)s. Out: the
requested gradients among dH, dW and db. No atomics, nothing is read back to the host. `fastdpo.kernels.rounds` gives
the round and the place in the workspace of each tile. Each round runs three kernels:

    D[slot]  = (softmax(z) - onehot) exp(lse_rest) dz/dy c     one program per kept tile
    dW[tile] = sum over the tile's row blocks  D[slot].T @ H   the two products, by one kernel
    dH[rows] += sum over the rows' tiles       D[slot] @ W

c is a factor of D here, because a scaled copy of the hidden states, as in eq. (12), would be as large as the hidden
states. c is first divided by the power of two below its largest value, so that fp16 keeps its range.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdpo.kernels.backward import power_of_two
from fastdpo.kernels.launch import device_blocks, scratch
from fastdpo.kernels.logits import tile_grads, tile_logits, tile_operands, tile_strides
from fastdpo.kernels.products import cast, column_sums, products
from fastdpo.kernels.rounds import Rounds, plan_rounds


@triton.jit(do_not_specialize=["round_index", "T"], do_not_specialize_on_alignment=["labels_ptr"])
def kept_logit_grads_kernel(
    out_ptr,  # (num_slots, BLOCK_T, BLOCK_V)
    hidden_ptr,  # (T, H), or with TMA its descriptor
    weight_ptr,  # (V, H), likewise
    bias_ptr,  # (V,) or unused
    labels_ptr,  # (T,) int64
    lse_whole_ptr,  # (T,) fp32
    lse_rest_ptr,  # (T,) fp32
    row_scale_ptr,  # (T,) fp32, c over its largest
    starts_ptr,  # and the next two: as in Rounds
    visits_ptr,
    slots_ptr,
    round_index,
    T,
    V,
    H,
    num_tiles,
    stride_ht,
    stride_hh,
    stride_wv,
    stride_wh,
    logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    TMA: tl.constexpr,
):
    """eq. (9) times c for one kept tile, zeros beyond the last row and the last vocabulary id."""
    visit = tl.load(starts_ptr + round_index) + tl.program_id(0)
    if visit >= tl.load(starts_ptr + round_index + 1):
        return
    place = tl.load(visits_ptr + visit)
    slot = tl.load(slots_ptr + place)
    row_block, tile = place // num_tiles, place % num_tiles

    t = row_block.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    v = tile.to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    t_safe = tl.minimum(t, T - 1)
    z, ratio = tile_logits(
        hidden_ptr,
        weight_ptr,
        bias_ptr,
        row_block,
        tile,
        T,
        V,
        H,
        stride_ht,
        stride_hh,
        stride_wv,
        stride_wh,
        logit_scale,
        softcap,
        HAS_BIAS,
        HAS_SOFTCAP,
        BLOCK_T,
        BLOCK_V,
        BLOCK_H,
        TMA,
    )

    grad = tile_grads(z, ratio, v, t_safe, labels_ptr, lse_whole_ptr, lse_rest_ptr, row_scale_ptr, V, HAS_SOFTCAP)
    grad = tl.where((t < T)[:, None] & (v < V)[None, :], grad, 0.0)
    out_ptr += slot.to(tl.int64) * BLOCK_T * BLOCK_V
    offsets = tl.arange(0, BLOCK_T)[:, None] * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
    tl.store(out_ptr + offsets, cast(grad, out_ptr.dtype.element_ty))


def sparse_head_gradients(
    hidden_states: Tensor,  # (T, H) fp16, bf16 or fp32
    weight: Tensor,  # (V, H), same dtype
    bias: Tensor | None,  # (V,), same dtype
    labels: Tensor,  # (T,) int64
    lse_whole: Tensor,  # (T,) fp32
    lse_rest: Tensor,  # (T,) fp32
    row_scale: Tensor,  # (T,) c in eq. (10), fp32; 0 in ignored rows
    kept: Tensor,  # (cdiv(T, block_t), cdiv(V, block_v)) bool
    *,
    block_t: int,
    block_v: int,
    logit_scale: float,
    softcap: float | None,
    hidden_dtype: torch.dtype | None,  # of dH; None: not wanted
    weight_dtype: torch.dtype | None,  # of dW
    bias_dtype: torch.dtype | None,  # of db
    max_tile_elements: int = 2**25,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """eq. (11) and (12) over the kept tiles. Row blocks whose row_scale is all zero count as not kept.

    Rows of dW and db in a tile that no row block keeps are exactly zero. Beyond the results it allocates the workspace,
    at most max_tile_elements in the operands' dtype or two vocabulary tiles of every row if that is more (for dH alone:
    two row blocks of the whole vocabulary); with dW or db also fp32 sums of dH; and index lists.
    """
    (T, H), V = hidden_states.shape, weight.shape[0]
    tiles_outside = weight_dtype is not None or bias_dtype is not None
    grad_hidden = grad_weight = grad_bias = None
    if hidden_dtype is not None:
        sums_dtype = torch.float32 if tiles_outside else hidden_dtype
        grad_hidden = torch.zeros((T, H), dtype=sums_dtype, device=weight.device)
    if weight_dtype is not None:
        grad_weight = torch.zeros((V, H), dtype=weight_dtype, device=weight.device)
    if bias_dtype is not None:
        grad_bias = torch.zeros(V, dtype=bias_dtype, device=weight.device)
    if T == 0 or hidden_dtype is weight_dtype is bias_dtype is None:
        return None if grad_hidden is None else grad_hidden.to(hidden_dtype), grad_weight, grad_bias

    rounds = plan_rounds(kept & _active(row_scale, block_t), max_tile_elements // (block_t * block_v), tiles_outside)
    unit = power_of_two(row_scale)
    tiles = scratch((rounds.num_slots, block_t, block_v), hidden_states, hidden_states.dtype)
    inputs = (hidden_states, weight, bias, labels.contiguous(), lse_whole, lse_rest, row_scale / unit)
    steps = [_tiles_filler(tiles, *inputs, rounds, logit_scale, softcap)]  # of every round
    if grad_weight is not None:
        steps.append(products(grad_weight, tiles, hidden_states, rounds.tiles, unit, transposed=True, finish=True))
    if grad_bias is not None:
        steps.append(column_sums(grad_bias, tiles, rounds.tiles, unit))
    if grad_hidden is not None:
        steps.append(
            products(grad_hidden, tiles, weight, rounds.rows, unit, transposed=False, finish=not tiles_outside)
        )
    for q in range(rounds.num_rounds):
        for step in steps:
            step(q)
    if grad_hidden is not None and tiles_outside:
        grad_hidden = grad_hidden.mul_(unit).to(hidden_dtype)
    return grad_hidden, grad_weight, grad_bias


def _tiles_filler(
    tiles: Tensor,  # (num_slots, block_t, block_v)
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    lse_whole: Tensor,
    lse_rest: Tensor,
    row_scale: Tensor,
    rounds: Rounds,
    logit_scale: float,
    softcap: float | None,
) -> Callable[[int], None]:
    """A function that computes the tiles of one round, given its number."""
    blocks = device_blocks(hidden_states, "skipping")._replace(block_t=tiles.shape[1], block_v=tiles.shape[2])
    operands, tma = tile_operands(hidden_states, weight, blocks)

    def fill(round_index: int) -> None:
        kept_logit_grads_kernel[(rounds.num_slots,)](
            tiles,
            *operands,
            labels if bias is None else bias.contiguous(),
            labels,
            lse_whole,
            lse_rest,
            row_scale,
            rounds.starts,
            rounds.visits,
            rounds.slots,
            round_index,
            hidden_states.shape[0],
            weight.shape[0],
            hidden_states.shape[1],
            rounds.slots.shape[1],
            *tile_strides(hidden_states, weight),
            float(logit_scale),
            1.0 if softcap is None else float(softcap),
            HAS_BIAS=bias is not None,
            HAS_SOFTCAP=softcap is not None,
            TMA=tma,
            **blocks.options(),
        )

    return fill


def _active(row_scale: Tensor, block_t: int) -> Tensor:
    """(num_row_blocks, 1): whether any row of the block has a factor that is not zero."""
    padding = -row_scale.shape[0] % block_t
    return (torch.nn.functional.pad(row_scale, (0, padding)) != 0).view(-1, block_t).any(1, keepdim=True)
