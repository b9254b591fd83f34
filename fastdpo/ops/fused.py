"""The head op with the Triton kernels: forward in two launches, backward in vocabulary blocks of bounded size.

In: validated tensors of one dtype. Out: the same as its counterpart `fastdpo.ops.tiled`. Backward is a hybrid: the
kernel recomputes a block of the logits' gradient into a workspace, and the matmul library multiplies it with fp32 sums.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastdpo.kernels import forward as forward_kernels
from fastdpo.kernels import launch
from fastdpo.kernels.backward import fill_logit_grads, power_of_two
from fastdpo.kernels.choices import choice_forward, fill_choice_grads
from fastdpo.ops.head import ChoiceRows, Head, SplitLse, Tiling, padded
from fastdpo.ops.matmul import product_bytes
from fastdpo.types import IGNORE_INDEX

BLOCK_ROWS = 8192
ROW_MULTIPLE = 16  # elements: rows of D that begin at multiples of it are stored and multiplied in wide words
CHUNK_MULTIPLE = 128  # rows of D: the height of the kernels' blocks
COLUMN_MULTIPLE = 8  # of hidden states and weights that an adapter widens: 16 bytes of fp16 or bf16
WORKSPACE_BYTES = 2**28  # by default
MOST_WORKSPACE_BYTES = 2**30  # by default, of D where every chunk of rows reads and writes the sums of dW


def choose_tiling(hidden_states: Tensor, lm_head_weight: Tensor, workspace_bytes: int | None = None) -> Tiling:
    """The blocks of the backward pass. Half of the workspace is for D, half for the fp32 sums of one block of dW."""
    (T, H), V = hidden_states.shape, lm_head_weight.shape[0]
    budget = WORKSPACE_BYTES if workspace_bytes is None else workspace_bytes
    half = (budget - min(product_bytes(hidden_states.device, hidden_states.dtype), budget // 2)) // 2
    return Tiling.within(T, H, V, BLOCK_ROWS, half // hidden_states.dtype.itemsize, half // 4, multiple=256)


def skip_blocks(hidden_states: Tensor) -> tuple[int, int]:
    """Numbers of rows and vocabulary ids in a unit of skipping: a tile of the forward kernel."""
    blocks = launch.device_blocks(hidden_states, "skipping")
    return blocks.block_t, blocks.block_v


def fused_forward(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    head: Head,
    adapter_weight: Tensor | None = None,
) -> dict[str, Tensor]:
    """The values named in ALWAYS and in `head.outputs`, each (T,). A label outside [0, V) gives nan.

    If tiles may be skipped, also TILE_SUMS for the kernel's tiles.
    """
    with _device(hidden_states):
        return forward_kernels.fused_forward(
            hidden_states,
            lm_head_weight,
            bias,
            labels,
            head.logit_scale,
            head.softcap,
            head.outputs,
            keep_partials=head.skip_tolerance > 0,
            adapter_weight=adapter_weight,
        )


def fused_forward_with_grads(
    out: Tensor,
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    head: Head,
    combine: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
    adapter_weight: Tensor | None = None,
) -> dict[str, Tensor]:
    """Returns the same as `fused_forward`, and writes D, eq. (9), of every row to `out` (T, V)."""
    with _device(hidden_states):
        return forward_kernels.fused_forward_with_grads(
            out,
            hidden_states,
            lm_head_weight,
            bias,
            labels,
            head.logit_scale,
            head.softcap,
            head.outputs,
            combine=combine,
            adapter_weight=adapter_weight,
        )


def fused_skipping_gradients(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    lse: SplitLse,
    head: Head,
    row_scale: Tensor,  # (T,) c in eq. (10)
    kept: Tensor,  # (num_row_blocks, num_tiles) bool, blocks as in `skip_blocks`
    hidden_dtype: torch.dtype | None,  # of dH; None: not wanted
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dH, dW and db over the kept tiles."""
    from fastdpo.kernels.sparse import sparse_head_gradients

    block_rows, block_vocab = skip_blocks(hidden_states)
    workspace_bytes = WORKSPACE_BYTES if head.workspace_bytes is None else head.workspace_bytes
    with _device(hidden_states):
        return sparse_head_gradients(
            hidden_states,
            lm_head_weight,
            bias,
            labels,
            lse.whole,
            lse.rest,
            row_scale,
            kept,
            block_t=block_rows,
            block_v=block_vocab,
            logit_scale=head.logit_scale,
            softcap=head.softcap,
            hidden_dtype=hidden_dtype,
            weight_dtype=weight_dtype,
            bias_dtype=bias_dtype,
            max_tile_elements=workspace_bytes // 2 // hidden_states.dtype.itemsize,
        )


def fused_choice_forward(
    hidden_states: Tensor, lm_head_weight: Tensor, bias: Tensor | None, labels: Tensor, head: Head
) -> dict[str, Tensor]:
    """logps (T, K), and per row lse_whole, lse_rest and head.outputs; is_top1 (T, K)."""
    names = tuple("max_logit" if name == "is_top1" else name for name in head.outputs)
    with _device(hidden_states):
        values, chosen = choice_forward(
            hidden_states,
            lm_head_weight,
            bias,
            labels,
            labels.amax(1),  # IGNORE_INDEX is below all ids
            head.logit_scale,
            head.softcap,
            names,
        )
    ignored = labels == IGNORE_INDEX
    logps = (chosen - values["lse_whole"][:, None]) - values["lse_rest"][:, None]
    values["logps"] = logps.masked_fill(ignored, 0.0)
    if "is_top1" in head.outputs:
        values["is_top1"] = (chosen >= values["max_logit"][:, None]) & ~ignored
    return values


class _FusedTiles:
    """The tiles of the backward pass, one after the other in one workspace."""

    row_scale: Tensor | None = None  # in the tiles

    def __init__(self, hidden_states: Tensor, lm_head_weight: Tensor, bias: Tensor | None, labels: Tensor, head: Head):
        self.tiling = choose_tiling(hidden_states, lm_head_weight, head.workspace_bytes)
        self.hidden_states, self.lm_head_weight, self.head = hidden_states, lm_head_weight, head
        self.labels = labels.contiguous()
        self.bias = None if bias is None else bias.contiguous()
        width = padded(min(self.tiling.block_vocab, self.tiling.num_vocab), ROW_MULTIPLE)
        self.workspace = launch.scratch((self.tiling.block_rows * width,), hidden_states, hidden_states.dtype)

    def tile(self, rows: slice, vocab: slice, weight: Tensor) -> Tensor:
        """(block_rows, block_vocab), valid until the next call, in the dtype of `weight`, the operand of W[vocab]."""
        num_rows, num_ids = rows.stop - rows.start, vocab.stop - vocab.start
        width = padded(num_ids, ROW_MULTIPLE)
        tile = self.workspace[: num_rows * width].view(num_rows, width)[:, :num_ids]
        bias = None if self.bias is None else self.bias[vocab]
        with _device(tile):
            self.fill(tile, self.hidden_states[rows], self.lm_head_weight[vocab], bias, rows, vocab.start)
        return tile.to(weight.dtype)

    def fill(
        self, tile: Tensor, hidden_states: Tensor, weight: Tensor, bias: Tensor | None, rows: slice, first_vocab: int
    ) -> None:
        raise NotImplementedError


class FusedLogitGrads(_FusedTiles):
    """Fills tiles of the logits' gradient, c D of eq. (9) and (10), by recomputing the logits."""

    def __init__(
        self,
        hidden_states: Tensor,
        lm_head_weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        lse: SplitLse,
        head: Head,
        row_scale: Tensor,
    ):
        super().__init__(hidden_states, lm_head_weight, bias, labels, head)
        self.lse = lse
        self.unit = power_of_two(row_scale) if hidden_states.dtype == torch.float16 else None  # fp16 keeps its range
        self.tile_scale = row_scale if self.unit is None else row_scale / self.unit

    def fill(
        self, tile: Tensor, hidden_states: Tensor, weight: Tensor, bias: Tensor | None, rows: slice, first_vocab: int
    ) -> None:
        fill_logit_grads(
            tile,
            hidden_states,
            weight,
            bias,
            self.labels[rows],
            self.lse.whole[rows],
            self.lse.rest[rows],
            self.tile_scale[rows],
            first_vocab,
            self.lm_head_weight.shape[0],
            self.head.logit_scale,
            self.head.softcap,
        )


class FusedChoiceGrads(_FusedTiles):
    """Fills tiles of the logits' gradient, eq. (22), by recomputing the logits."""

    def __init__(
        self,
        hidden_states: Tensor,
        lm_head_weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        rows: ChoiceRows,
        head: Head,
    ):
        super().__init__(hidden_states, lm_head_weight, bias, labels, head)
        self.rows, self.unit = rows._replace(grads=rows.grads.contiguous()), rows.unit

    def fill(
        self, tile: Tensor, hidden_states: Tensor, weight: Tensor, bias: Tensor | None, rows: slice, first_vocab: int
    ) -> None:
        fill_choice_grads(
            tile,
            hidden_states,
            weight,
            bias,
            self.labels[rows],
            self.rows.grads[rows],
            self.rows.lse.whole[rows],
            self.rows.lse.rest[rows],
            self.rows.offset[rows],
            self.rows.slope[rows],
            first_vocab,
            self.head.logit_scale,
            self.head.softcap,
        )


def _device(x: Tensor) -> torch.cuda.device:
    """Makes the device of `x` the current one, because Triton launches there. Does nothing for CPU tensors."""
    return torch.cuda.device(x.device if x.is_cuda else -1)
