"""Forward of the head op: partial softmax sums per (row, vocabulary tile), then a small kernel that merges them.

In: hidden states, head weight, labels. Out: logps, split lse and the requested statistics, each (T,) fp32; on request
also the logits' gradient, eq. (9), computed from the same logits in the caller's (T, V) tensor. Tiles are stateless: no
atomics, no locks, the same bits every time; partials take 4 bytes per row, tile and statistic.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdpo.kernels.finish import finish_grads
from fastdpo.kernels.launch import Blocks, can_flatten, device_blocks, num_programs, scratch
from fastdpo.kernels.library import library_partials
from fastdpo.kernels.logits import program_tile, tile_logits, tile_operands, tile_strides
from fastdpo.kernels.merge import Partials, merge, statistics
from fastdpo.kernels.sums import store_partials


@triton.jit(
    do_not_specialize=["T"],  # nor compiled anew for each of its values
    do_not_specialize_on_alignment=[  # slices, which start anywhere
        *("labels_ptr", "bias_ptr", "sumexp_ptr", "sum_z_exp_ptr", "sum_sq_exp_ptr", "sum_z_ptr")
    ],
)
def partials_kernel(
    hidden_ptr,  # (T, H), or with TMA its descriptor
    weight_ptr,  # (V, H), likewise
    bias_ptr,  # (V,) or unused
    labels_ptr,  # (T,) int64
    label_logit_ptr,  # (T,) fp32; only rows whose label lies in the vocabulary are written
    max_ptr,  # (num_tiles, T) fp32, and so are all below
    sumexp_ptr,
    sum_z_exp_ptr,
    sum_sq_exp_ptr,
    sum_z_ptr,
    out_ptr,  # (T, V) in the operands' dtype, or unused
    extra_ptr,  # (T, R) of the strides of hidden_ptr, or with TMA its descriptor, or unused
    adapter_ptr,  # (V, R) contiguous, likewise
    T,
    V,
    H,
    R,
    stride_ht,
    stride_hh,
    stride_wv,
    stride_wh,
    stride_out,
    logit_scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    WITH_SQUARES: tl.constexpr,
    WITH_MEAN: tl.constexpr,
    WITH_GRADS: tl.constexpr,
    HAS_ADAPTER: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP_T: tl.constexpr,
    TMA: tl.constexpr,
    PERSISTENT: tl.constexpr,
    FLATTEN: tl.constexpr,  # the next tile's loads start during this one's sums; slower before sm_100
):
    """eq. (3) for one tile; WITH_GRADS also its exponentials, eq. (13), from which `finish_grads_kernel` makes (9)."""
    num_tiles = 1
    if PERSISTENT:
        num_tiles = tl.cdiv(tl.cdiv(T, BLOCK_T) * tl.cdiv(V, BLOCK_V) - tl.program_id(0), tl.num_programs(0))
    for i in tl.range(0, num_tiles, flatten=FLATTEN):
        program = tl.program_id(0) + i * tl.num_programs(0)
        row_block, tile = program_tile(program, T, V, BLOCK_T, BLOCK_V, GROUP_T)

        t = row_block.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
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
            extra_ptr,
            adapter_ptr,
            R,
            HAS_ADAPTER,
        )

        store_partials(
            z,
            ratio,
            t,
            t < T,
            tile,
            T,
            V,
            labels_ptr,
            label_logit_ptr,
            max_ptr,
            sumexp_ptr,
            sum_z_exp_ptr,
            sum_sq_exp_ptr,
            sum_z_ptr,
            out_ptr,
            row_block,
            stride_out,
            HAS_SOFTCAP,
            WITH_ENTROPY,
            WITH_SQUARES,
            WITH_MEAN,
            WITH_GRADS,
            BLOCK_T,
            BLOCK_V,
        )


def fused_forward(
    hidden_states: Tensor,  # (T, H) fp16, bf16 or fp32
    lm_head_weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (T,) int64
    logit_scale: float,
    softcap: float | None,
    outputs: tuple[str, ...],
    blocks: Blocks | None = None,
    keep_partials: bool = False,
    visit: Callable[[Tensor, slice, slice], None] | None = None,
    adapter_weight: Tensor | None = None,  # (V, R), which the columns of hidden_states beyond H multiply
) -> dict[str, Tensor]:
    """logps, lse_whole, lse_rest and `outputs`, each (T,).

    With `keep_partials` also tile_max and tile_sumexp, (num_tiles, T) fp32: the partials of every row and vocabulary
    tile, eq. (3), for tiles of `blocks.block_v`. `visit` as in `library_partials`, for blocks of the library.
    """
    labels = labels.contiguous()
    options = bias is not None or softcap is not None or any(statistics(outputs).values())
    kernel = "skipping" if keep_partials else "forward_options" if options else "forward"
    blocks = blocks or device_blocks(hidden_states, kernel)
    head = (lm_head_weight, bias, labels, logit_scale, softcap)
    values, partials = _forward(None, hidden_states, *head, outputs, blocks, visit, adapter_weight)
    if keep_partials:
        values |= {"tile_max": partials.max, "tile_sumexp": partials.sumexp}
    return values


def fused_forward_with_grads(
    out: Tensor,  # (T, V) of row stride >= V, operands' dtype; filled with D, eq. (9), and its padding with anything
    hidden_states: Tensor,  # and so on as in fused_forward
    lm_head_weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    logit_scale: float,
    softcap: float | None,
    outputs: tuple[str, ...],
    blocks: Blocks | None = None,
    combine: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
    adapter_weight: Tensor | None = None,
) -> dict[str, Tensor]:
    """Like `fused_forward`, and the logits' gradient in `out` without a second matmul (ignored rows are 0).

    If these are the logits of a part of a vocabulary, `combine` returns the values of the whole one, and `out` gets
    that part's gradient.
    """
    labels = labels.contiguous()
    options = bias is not None or softcap is not None or any(statistics(outputs).values())
    blocks = blocks or device_blocks(hidden_states, "eager_options" if options else "eager")
    head = (lm_head_weight, bias, labels, logit_scale, softcap)
    values, partials = _forward(out, hidden_states, *head, outputs, blocks, None, adapter_weight)
    if combine is not None:
        values = combine(values)
    if out.numel() > 0:
        finish_grads(out, partials, labels, values, softcap, blocks.block_v)
    return values


def _forward(
    out: Tensor | None,
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,  # contiguous
    logit_scale: float,
    softcap: float | None,
    outputs: tuple[str, ...],
    blocks: Blocks,
    visit: Callable[[Tensor, slice, slice], None] | None,
    adapter_weight: Tensor | None,
) -> tuple[dict[str, Tensor], Partials]:
    """The values, and the partials that they are merged from; with `out` also the tiles of eq. (13) in `out`."""
    T, V = hidden_states.shape[0], lm_head_weight.shape[0]
    values = {
        name: hidden_states.new_empty(T, dtype=torch.float32) for name in ("logps", "lse_whole", "lse_rest", *outputs)
    }
    if "is_top1" in values:
        values["is_top1"] = hidden_states.new_empty(T, dtype=torch.int8)
    wants = statistics(outputs)
    num_tiles = triton.cdiv(V, blocks.block_v)
    label_logit = scratch((T,), hidden_states, torch.float32)
    sums = scratch((2 + sum(wants.values()), num_tiles, T), hidden_states, torch.float32)
    spare = iter(sums[2:])
    extra = (next(spare) if wanted else sums[0] for wanted in wants.values())
    partials = Partials(label_logit, sums[0], sums[1], *extra)
    if T > 0:
        head = (lm_head_weight, bias, labels, logit_scale, softcap)
        _launch_partials(partials, out, hidden_states, *head, wants, blocks, visit, adapter_weight)
        merge(partials, labels, values, V)
    if "is_top1" in values:
        values["is_top1"] = values["is_top1"].bool()
    return values, partials


def _launch_partials(
    partials: Partials,
    out: Tensor | None,
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    logit_scale: float,
    softcap: float | None,
    wants: dict[str, bool],
    blocks: Blocks,
    visit: Callable[[Tensor, slice, slice], None] | None,
    adapter_weight: Tensor | None,
) -> None:
    if blocks.library:
        head = (hidden_states, lm_head_weight, bias, labels, logit_scale, softcap)
        return library_partials(partials, out, *head, wants, blocks, visit, adapter_weight)
    T, (V, H) = hidden_states.shape[0], lm_head_weight.shape
    R = 0 if adapter_weight is None else adapter_weight.shape[1]
    adapter = () if adapter_weight is None else (hidden_states[:, H : H + R], adapter_weight.contiguous())
    hidden_states = hidden_states[:, :H]
    (hidden, weight, *adapter), tma = tile_operands(hidden_states, lm_head_weight, blocks, *adapter)
    num_tiles = triton.cdiv(T, blocks.block_t) * triton.cdiv(V, blocks.block_v)
    partials_kernel[(num_programs(blocks, num_tiles, hidden_states),)](
        hidden,
        weight,
        labels if bias is None else bias.contiguous(),
        labels,
        *partials,
        partials.label_logit if out is None else out,
        *(adapter or (partials.label_logit,) * 2),
        T,
        V,
        H,
        R,
        *tile_strides(hidden_states, lm_head_weight),
        V if out is None else out.stride(0),
        float(logit_scale),
        1.0 if softcap is None else float(softcap),
        HAS_BIAS=bias is not None,
        HAS_SOFTCAP=softcap is not None,
        **wants,
        WITH_GRADS=out is not None,
        HAS_ADAPTER=adapter_weight is not None,
        GROUP_T=8,
        TMA=tma,
        PERSISTENT=blocks.persistent > 0,
        FLATTEN=blocks.persistent > 0 and can_flatten(hidden_states),
        **blocks.options(),
    )
