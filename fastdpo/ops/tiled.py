"""The head op in pure PyTorch, one token x vocabulary tile at a time: any device, any dtype, memory bounded by a tile.

In: validated tensors of one dtype. Out: per-row numbers from `tiled_forward`; from `TiledLogitGrads` the tiles that
`fastdpo.ops.gradients` multiplies into dH, dW and db; `tiled_eager.py` computes both at once for a chunk of rows. No
tensor of size (T, V) exists, and nothing is read back to the host.
Equation numbers are those of kernels/README.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fastdpo.ops.head import ALWAYS, TILE_SUMS, Head, SplitLse, Tiling
from fastdpo.ops.matmul import accumulator_dtype, matmul_into, operand
from fastdpo.types import ELSEWHERE, IGNORE_INDEX

BLOCK_ROWS = 512
MAX_TILE_ELEMENTS = 2**21  # 8 MiB of fp32 logits; smaller tiles cost more in starting threads than they save in cache
MAX_WEIGHT_ELEMENTS = 2**22  # elements of weight rows to upcast at once, if necessary
SKIP_ROWS, SKIP_VOCAB = 128, 128  # the unit of skipping
EXP_FLOOR = -1000.0  # exp of it is 0 in fp32 and fp64, while 0 * EXP_FLOOR stays 0 (0 * -inf would be nan)


def choose_tiling(hidden_states: Tensor, lm_head_weight: Tensor, workspace_bytes: int | None = None) -> Tiling:
    """The tiles of both passes: half of a given workspace for logits, half for rows of the weight or its gradient."""
    (T, H), V = hidden_states.shape, lm_head_weight.shape[0]
    tile, weight = MAX_TILE_ELEMENTS, MAX_WEIGHT_ELEMENTS
    if workspace_bytes is not None:
        tile = weight = workspace_bytes // 2 // accumulator_dtype(hidden_states.dtype).itemsize
    return Tiling.within(T, H, V, BLOCK_ROWS, tile, weight)


def skip_blocks(hidden_states: Tensor) -> tuple[int, int]:
    return SKIP_ROWS, SKIP_VOCAB


def tiled_forward(
    hidden_states: Tensor,  # (T, H)
    lm_head_weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (T,) int64
    head: Head,
    adapter_weight: Tensor | None = None,  # (V, r), for hidden_states (T, H + r)
) -> dict[str, Tensor]:
    """The values named in ALWAYS and in `head.outputs`, each (T,). A label outside [0, V) gives nan.

    If tiles may be skipped, also TILE_SUMS for tiles of SKIP_VOCAB ids.
    """
    tiling = choose_tiling(hidden_states, lm_head_weight, head.workspace_bytes)
    if head.skip_tolerance > 0:
        tiling = replace(tiling, block_vocab=-(-tiling.block_vocab // SKIP_VOCAB) * SKIP_VOCAB)
    state = RowState(hidden_states, lm_head_weight, labels, head)
    scratch = scratch_of(tiling, state.max)
    second = scratch_of(tiling, state.max) if "entropy" in head.outputs else None
    for rows, vocab, logits in logit_tiles(hidden_states, lm_head_weight, bias, head, tiling, scratch, adapter_weight):
        state.absorb(rows, vocab, logits, None if second is None else tile_of(second, rows, vocab))
    return state.finish()


def logit_tiles(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    bias: Tensor | None,
    head: Head,
    tiling: Tiling,
    scratch: Tensor,
    adapter_weight: Tensor | None = None,
) -> Iterator[tuple[slice, slice, Tensor]]:
    """(rows, vocab, logits) of every tile; the logits are in `scratch`, valid until the next tile."""
    for vocab in tiling.vocab():
        weight = operand(lm_head_weight[vocab]).T  # (H, block_vocab)
        adapter = None if adapter_weight is None else operand(adapter_weight[vocab]).T  # (r, block_vocab)
        some = None if bias is None else bias[vocab]
        for rows in tiling.rows():
            logits = tile_of(scratch, rows, vocab)
            fill_logits(logits, operand(hidden_states[rows]), weight, some, head, adapter_t=adapter)
            yield rows, vocab, logits
        del weight  # where it is a cast, before the next one is made


class RowState:
    """The running sums of each row over the tiles so far: eq. (4) to (7), merged tile by tile."""

    def __init__(self, hidden_states: Tensor, lm_head_weight: Tensor, labels: Tensor, head: Head):
        self.labels, self.head, self.num_vocab = labels, head, lm_head_weight.shape[0]
        T, dtype = hidden_states.shape[0], accumulator_dtype(hidden_states.dtype)

        def new(value: float) -> Tensor:
            return torch.full((T,), value, dtype=dtype, device=hidden_states.device)

        self.max = new(-torch.inf)
        self.sumexp = new(0.0)  # sum of exp(z - max)
        self.label_logit = new(torch.nan)  # stays nan for a label outside the vocabulary
        self.sum_z_exp = new(0.0)  # sum of (z - max) exp(z - max), for entropy
        self.sum_sq_exp = new(0.0)  # sum of exp(z - max)**2, for log_sum_sq_probs
        self.sum_z = new(0.0)  # for mean_logits
        # per row and tile of SKIP_VOCAB, if tiles may be skipped
        shape = (-(-self.num_vocab // SKIP_VOCAB), T) if head.skip_tolerance > 0 else (0, T)
        self.tile_max, self.tile_sumexp = self.max.new_empty(shape), self.max.new_empty(shape)

    def absorb(self, rows: slice, vocab: slice, logits: Tensor, second: Tensor | None) -> None:
        """Adds one tile of logits, which is overwritten."""
        column, inside = label_columns(self.labels[rows], vocab)
        picked = logits.gather(1, column[:, None])[:, 0]
        self.label_logit[rows] = torch.where(inside, picked, self.label_logit[rows])
        if "mean_logits" in self.head.outputs:
            self.sum_z[rows] += logits.sum(1)

        old_max = self.max[rows]
        new_max = torch.maximum(old_max, logits.amax(1))
        shift = new_max.masked_fill(new_max == -torch.inf, 0.0)
        moved = (old_max - shift).clamp_(min=EXP_FLOOR)
        decay = moved.exp()
        logits.sub_(shift[:, None])
        if second is not None:
            exps = torch.exp(logits, out=second)
            tile_sum = logits.clamp_(min=EXP_FLOOR).mul_(exps).sum(1)
            self.sum_z_exp[rows] = decay * (self.sum_z_exp[rows] + moved * self.sumexp[rows]) + tile_sum
        else:
            exps = logits.exp_()
        self.sumexp[rows] = decay * self.sumexp[rows] + exps.sum(1)
        if self.head.skip_tolerance > 0:
            whole, rest = exps.split([exps.shape[1] // SKIP_VOCAB * SKIP_VOCAB, exps.shape[1] % SKIP_VOCAB], 1)
            sums = torch.cat([whole.unflatten(1, (-1, SKIP_VOCAB)).sum(2), rest.sum(1, keepdim=True)], 1)
            first, last = vocab.start // SKIP_VOCAB, -(-vocab.stop // SKIP_VOCAB)
            self.tile_sumexp[first:last, rows] = sums.T[: last - first]
            self.tile_max[first:last, rows] = shift
        if "log_sum_sq_probs" in self.head.outputs:
            self.sum_sq_exp[rows] = decay.square() * self.sum_sq_exp[rows] + exps.square_().sum(1)
        self.max[rows] = new_max

    def finish(self) -> dict[str, Tensor]:
        log_sum = self.sumexp.log()
        keep = self.labels != IGNORE_INDEX
        lse_whole = (self.max + log_sum).round()
        values = {
            "logps": (self.label_logit - self.max) - log_sum,  # in this order: a peaked row keeps its small numbers
            "lse_whole": lse_whole,
            "lse_rest": (self.max - lse_whole) + log_sum,
            "lse": self.max + log_sum,
            "entropy": log_sum - self.sum_z_exp / self.sumexp,
            "mean_logits": self.sum_z / self.num_vocab,
            "is_top1": self.label_logit >= self.max,
            "max_logit": self.max,
            "log_sum_sq_probs": self.sum_sq_exp.log() - 2 * log_sum,
        }
        found = {name: values[name].masked_fill(~keep, 0) for name in (*ALWAYS, *self.head.outputs)}
        return found | dict(zip(TILE_SUMS, (self.tile_max, self.tile_sumexp), strict=True))


class TiledLogitGrads:
    """Fills tiles of the logits' gradient, D of eq. (9), by recomputing the logits."""

    unit: Tensor | None = None

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
        self.tiling = choose_tiling(hidden_states, lm_head_weight, head.workspace_bytes)
        self.bias = bias
        self.row_scale: Tensor | None = row_scale
        self.rows = GradRows(hidden_states, labels, lse, head, lm_head_weight.shape[0])
        self.scratch = scratch_of(self.tiling, lse.whole)
        self.second = scratch_of(self.tiling, lse.whole) if head.softcap is not None else None

    def tile(self, rows: slice, vocab: slice, weight: Tensor) -> Tensor:
        """(block_rows, block_vocab), valid until the next call, in the dtype of `weight`, the operand of W[vocab]."""
        out = tile_of(self.scratch, rows, vocab)
        slope = None if self.second is None else tile_of(self.second, rows, vocab)
        column, inside = label_columns(self.rows.labels[rows], vocab)
        bias = None if self.bias is None else self.bias[vocab]
        self.rows.fill(out, rows, weight, bias, column[:, None], inside, slope)
        return out.to(weight.dtype)  # without c: one more pass over the tile costs more here than scaled rows


class GradRows:
    """The row data of eq. (9), for any selection of rows of the weight."""

    def __init__(self, hidden_states: Tensor, labels: Tensor, lse: SplitLse, head: Head, num_vocab: int):
        self.hidden_states, self.labels, self.head = hidden_states, labels, head
        # exp(z - inf) = 0: an ignored row has no probabilities. A label outside the vocabulary makes its row nan.
        in_vocab = (labels >= 0) & (labels < num_vocab) | (labels == ELSEWHERE)
        self.lse_whole = lse.whole.where(in_vocab, torch.nan).masked_fill(labels == IGNORE_INDEX, torch.inf)
        self.onehot = -lse.rest.exp()

    def fill(
        self,
        out: Tensor,  # (rows, columns)
        rows: slice | Tensor,
        weight: Tensor,  # (columns, H) operand
        bias: Tensor | None,  # (columns,)
        label_column: Tensor,  # (rows, 1), clamped
        has_label: Tensor,  # (rows,) bool
        slope: Tensor | None,  # (rows, columns) scratch where there is a softcap
    ) -> None:
        """D of these rows and columns."""
        fill_logits(out, operand(self.hidden_states[rows]), weight.T, bias, self.head, slope)
        probs = out.sub_(self.lse_whole[rows, None]).exp_()
        probs.scatter_add_(1, label_column, (self.onehot[rows] * has_label)[:, None])
        if slope is not None:
            probs.mul_(slope)


def fill_uncapped(
    out: Tensor,  # (rows, columns)
    hidden_states: Tensor,  # (rows, H), with an adapter (rows, at least H + r)
    weight_t: Tensor,  # (H, columns)
    bias: Tensor | None,
    head: Head,
    adapter_t: Tensor | None = None,  # (r, columns)
) -> None:
    """eq. (1) and the scale of eq. (2) for one tile."""
    scale, H = head.logit_scale, weight_t.shape[0]
    if bias is None:
        matmul_into(out, hidden_states[:, :H], weight_t, alpha=scale)
    else:
        out.copy_(bias)
        matmul_into(out, hidden_states[:, :H], weight_t, alpha=scale, beta=scale)
    if adapter_t is not None:
        matmul_into(out, hidden_states[:, H : H + adapter_t.shape[0]], adapter_t, alpha=scale, beta=1.0)


def fill_logits(
    out: Tensor,
    hidden_states: Tensor,
    weight_t: Tensor,
    bias: Tensor | None,
    head: Head,
    slope: Tensor | None = None,
    adapter_t: Tensor | None = None,
) -> None:
    """eq. (1) and (2) for one tile; writes the derivative of the softcap to `slope` if given."""
    fill_uncapped(out, hidden_states, weight_t, bias, head, adapter_t)
    if head.softcap is not None:
        out.div_(head.softcap).tanh_()
        if slope is not None:
            torch.mul(out, out, out=slope).neg_().add_(1.0)
        out.mul_(head.softcap)


def label_columns(labels: Tensor, vocab: slice) -> tuple[Tensor, Tensor]:
    """Each label as a column of this vocabulary block, clamped, and whether it is inside; both in the labels' shape."""
    column = labels - vocab.start
    width = vocab.stop - vocab.start
    return column.clamp(0, width - 1), (column >= 0) & (column < width)


def scratch_of(tiling: Tiling, like: Tensor) -> Tensor:
    return like.new_empty(tiling.block_rows * tiling.block_vocab)


def tile_of(scratch: Tensor, rows: slice, vocab: slice) -> Tensor:
    """A contiguous tile of any shape at the start of the scratch: ragged tiles reuse the same memory."""
    shape = (rows.stop - rows.start, vocab.stop - vocab.start)
    return scratch[: shape[0] * shape[1]].view(shape)
