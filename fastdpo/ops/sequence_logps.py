"""`sequence_logps`: log-probs of whole responses, the masked and weighted sum of `linear_logps` over each sequence.

In: the arguments of `linear_logps`, and the tokens of each sequence. Out: SequenceLogps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdpo.ops.linear_logps import linear_logps
from fastdpo.ops.token_sums import Tokens, token_sums
from fastdpo.ops.validation import check_head, check_sequences
from fastdpo.types import SequenceLogps


def sequence_logps(
    hidden_states: Tensor,
    lm_head_weight: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor,
    *,
    rows: Tensor | None = None,
    weights: Tensor | None = None,
    bias: Tensor | None = None,
    **same: Any,
) -> SequenceLogps:
    """Summed log-prob of each sequence, in nats. A token shared by two sequences is computed once and counts in both.

    Two responses "x a b" and "x c" to one prompt share their first token x and need four rows of the head:

        labels     = [x, a, b, c]
        rows       = [0, 1, 2,  0, 3]     # the tokens of both sequences, each by the row that predicts it
        cu_seqlens = [0, 3, 5]            # sequence 0 is tokens 0..2, sequence 1 is tokens 3..4

    Args:
        hidden_states, lm_head_weight, labels, bias, **same: as in `linear_logps`, over the T rows of the head.
        cu_seqlens: (S + 1,) integers rising from 0 to N; tokens cu_seqlens[s] to cu_seqlens[s + 1] are sequence s.
        rows: (N,) integers in [0, T), the row of each token; by default token n is row n.
        weights: (N,) factor of each token's log-prob (loss masks, ld_alpha); by default 1.
    Returns:
        SequenceLogps: sums (S,) fp32 (fp64 for fp64 inputs), 0.0 for a sequence without tokens; lengths (S,) int64,
        the number of tokens whose label is not IGNORE_INDEX, whatever their weight; tokens, the TokenLogps over the T
        rows. Both sums and tokens.logps are differentiable.
    Raises:
        ValueError: as in `linear_logps`, or cu_seqlens, rows or weights do not match (values are checked on the CPU
            only).
    """
    check_head(hidden_states, lm_head_weight, labels, bias)
    check_sequences(cu_seqlens, rows, weights, labels)
    tokens = linear_logps(hidden_states, lm_head_weight, labels, bias=bias, **same)
    place = Tokens(cu_seqlens.to(torch.int64), None if rows is None else rows.to(torch.int64), weights)
    labels, impl = labels.to(torch.int64), same.get("impl", "auto")
    (sums,), lengths = token_sums([tokens.logps], place, labels=labels, impl=impl)
    return SequenceLogps(sums=sums, lengths=lengths, tokens=tokens)
