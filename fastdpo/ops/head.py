"""The settings of one LM head, and the tiles that cover its (T, V) logits.

`Head` holds the operations on logits after the matmul; `Tiling` iterates over row blocks and vocabulary blocks within a
memory budget.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastdpo.ops.shard import Shard
from fastdpo.types import IGNORE_INDEX

ALWAYS = ("logps", "lse_whole", "lse_rest")  # returned by every forward pass, besides the requested statistics
TILE_SUMS = ("tile_max", "tile_sumexp")  # and where tiles may be skipped: eq. (3), each (num_tiles, T)


@dataclass(frozen=True)
class Head:
    """`z = softcap * tanh(logit_scale * a / softcap)` for `a = h @ W.T + b`; without softcap `z = logit_scale * a`."""

    logit_scale: float = 1.0
    softcap: float | None = None
    outputs: tuple[str, ...] = ()  # requested statistics, out of TOKEN_OUTPUTS
    skip_tolerance: float = 0.0  # probability mass that backward may drop per row
    workspace_bytes: int | None = None  # temporary memory of a pass; None: the implementation's default
    shard: Shard | None = None  # the part of the vocabulary that the weight holds; None: all of it
    output_grads: tuple[str, ...] = ()  # statistics that have a gradient, out of GRAD_OUTPUTS


class SplitLse(NamedTuple):
    """lse as an integer plus a rest, eq. (8), because backward needs `z - lse` more precisely than one float allows.

    If one token of a row has nearly all probability, lse = 80.3 has an error of up to 4e-6, and the probability would
    have the same error. z - 80 is exact, and the rest is a factor of the whole row.
    """

    whole: Tensor  # (T,) integers as floats
    rest: Tensor  # (T,) in [-0.5, 0.5]


def row_scale(grad_logps: Tensor, lse_rest: Tensor, labels: Tensor, head: Head) -> Tensor:
    """(T,) c of eq. (10): the factor between D, eq. (9), and the logits' gradient; 0 in ignored rows."""
    scale = grad_logps * -head.logit_scale * torch.exp(-lse_rest)
    return scale.masked_fill_(labels == IGNORE_INDEX, 0.0)


class ChoiceRows(NamedTuple):
    """What eq. (22) needs of each row besides its logits; gradients in units of `unit`."""

    grads: Tensor  # (T, K) g, 0 at ignored labels
    offset: Tensor  # (T,) sum_k g_k - l + e E
    slope: Tensor  # (T,) e
    lse: SplitLse  # inf in ignored rows, whose probabilities are then 0; nan in rows with a label out of range
    unit: Tensor | None  # (1,) power of two that keeps fp16 in its range; None: 1


def choice_rows(
    grad_logps: Tensor | None,  # (T, K) g
    grad_lse: Tensor | None,  # (T,) l
    grad_entropy: Tensor | None,  # (T,) e
    entropy: Tensor | None,  # (T,) E, given with grad_entropy
    lse: SplitLse,
    labels: Tensor,  # (T, K)
    num_vocab: int,
    dtype: torch.dtype,  # of the matmuls' operands
) -> ChoiceRows:
    ignored = labels == IGNORE_INDEX  # (T, K)
    grads = lse.whole.new_zeros(labels.shape) if grad_logps is None else grad_logps.masked_fill(ignored, 0.0)
    zeros = lse.whole.new_zeros(lse.whole.shape)
    of_lse, slope = (
        (zeros if grad is None else grad).masked_fill(ignored.all(1), 0.0) for grad in (grad_lse, grad_entropy)
    )
    unit = None
    if dtype == torch.float16:
        sizes = [grads.abs().flatten(), of_lse.abs(), slope.abs(), zeros.new_zeros(1)]
        largest = torch.cat(sizes).amax(0, keepdim=True)
        unit = torch.where(largest > 0, largest.log2().floor().exp2(), 1.0)
        grads, of_lse, slope = grads / unit, of_lse / unit, slope / unit
    offset = grads.sum(1) - of_lse
    if grad_entropy is not None and entropy is not None:
        offset = offset + slope * entropy
    wrong = (~ignored & ((labels < 0) | (labels >= num_vocab))).any(1)
    whole = lse.whole.masked_fill(ignored.all(1), torch.inf).masked_fill(wrong, torch.nan)
    return ChoiceRows(grads, offset, slope, SplitLse(whole, lse.rest), unit)


def joined_weight(
    lm_head_weight: Tensor,  # (V, H)
    adapter_weight: Tensor | None,  # (V, r)
    dtype: torch.dtype | None = None,
    multiple: int = 1,
) -> Tensor:
    """(V, H + r): both weights side by side, in `dtype` or lm_head_weight's, differentiable; without an adapter the
    first.

    With an adapter, zeros pad the result to a multiple of `multiple` columns.
    """
    dtype = lm_head_weight.dtype if dtype is None else dtype
    if adapter_weight is None:
        return lm_head_weight.to(dtype)
    (V, H), r = lm_head_weight.shape, adapter_weight.shape[1]
    width = padded(H + r, multiple)
    if torch.is_grad_enabled():
        return pad(torch.cat([lm_head_weight.to(dtype), adapter_weight.to(dtype)], 1), (0, width - H - r))
    joined = torch.empty(V, width, dtype=dtype, device=lm_head_weight.device)  # one copy, also where dtypes differ
    joined[:, :H].copy_(lm_head_weight)
    joined[:, H : H + r].copy_(adapter_weight)
    joined[:, H + r :].zero_()
    return joined


def padded(width: int, multiple: int) -> int:
    """`width`, or the next multiple."""
    return -(-width // multiple) * multiple


@dataclass(frozen=True)
class Tiling:
    """Blocks of `block_rows` x `block_vocab` over (num_rows, num_vocab); the last ones are ragged."""

    num_rows: int
    num_vocab: int
    block_rows: int
    block_vocab: int

    @classmethod
    def within(
        cls,
        num_rows: int,
        hidden_size: int,
        num_vocab: int,
        block_rows: int,
        max_elements: int,
        max_weights: int,
        multiple: int = 1,
    ) -> Tiling:
        """At most `block_rows` rows and `max_elements` logits per block, and `max_weights` elements of the weight.

        All vocabulary blocks except the last are a multiple of `multiple` ids, if that many fit.

        Examples:
            1000 rows, V = 32000, 256 rows and 2**20 logits give blocks of 256 x 4000 instead of seven of 4096 and a
            rest; with multiples of 256 they are 256 x 4096.
        """
        block_rows = max(1, min(num_rows, block_rows))
        most = max(1, min(max_elements // block_rows, max_weights // hidden_size))
        multiple = multiple if multiple <= most else 1
        most = most // multiple * multiple
        block_vocab = -(-num_vocab // -(-num_vocab // most))
        return cls(num_rows, num_vocab, block_rows, -(-block_vocab // multiple) * multiple)

    def rows(self) -> Iterator[slice]:
        return _blocks(self.num_rows, self.block_rows)

    def vocab(self) -> Iterator[slice]:
        return _blocks(self.num_vocab, self.block_vocab)


def _blocks(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))
