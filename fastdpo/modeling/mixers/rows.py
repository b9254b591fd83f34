"""The rows of a packed row that a token mixer runs on: segments in, index tensors out.

A mixer needs the tokens of `prefix + branch` in order; only the output rows of the branch itself are kept. The first
pair of `data/batches/packing.py`, prompt [1 2], responses [3 4] and [5], has segments (0,4, 0,0) (4,5, 0,2):

    gathered      0 1 2 3 | 0 1 4         rows of the packed row, equal to `VarlenLayout.key_rows`
    one call      0 1 2 3                 of two sequences: indices into the gathered rows; the shorter sequence repeats
                  4 5 6 6                 its last token
    kept          0 1 2 3 6               indices into the call's outputs, flattened

Sequences of similar length run in one call: later tokens do not change the output of a causal mixer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fastdpo.types import VarlenLayout

LEAST_FILLED = 0.8  # of a call's positions along each sequence; the rest repeats its last token


class MixerRows:
    """The sequences of one packed row for mixers, in one of two ways. Built once per forward.

    Args:
        segments: per branch query start, query end, prefix start, prefix end, on the host.
        varlen: the same as index tensors on the row's device.
    """

    def __init__(self, segments: Sequence[tuple[int, int, int, int]], varlen: VarlenLayout) -> None:
        self.segments = tuple(segments)
        self.varlen = varlen
        self.num_rows = self.segments[-1][1] if self.segments else 0
        self._table = np.asarray(self.segments, dtype=np.int64).reshape(-1, 4)

    @property
    def num_prefix(self) -> np.ndarray:
        """(N,) number of tokens of each branch's prefix."""
        table: np.ndarray = self._table[:, 3] - self._table[:, 2]
        return table

    @property
    def lengths(self) -> np.ndarray:
        """(N,) number of tokens of prefix and branch."""
        table: np.ndarray = self.num_prefix + self._table[:, 1] - self._table[:, 0]
        return table

    @cached_property
    def calls(self) -> tuple[Tensor, ...]:
        """Each (S, L) int64: indices into the gathered rows for S sequences that run together."""
        return tuple(torch.from_numpy(call).to(self.varlen.key_rows.device) for call in self._calls()[0])

    @cached_property
    def kept(self) -> Tensor:
        """(T,) int64: index of each row of the packed row in the flattened, concatenated outputs of the calls."""
        return torch.from_numpy(self._calls()[1]).to(self.varlen.key_rows.device)

    def _calls(self) -> tuple[list[np.ndarray], np.ndarray]:
        lengths, num_prefix = self.lengths, self.num_prefix
        first_key = lengths.cumsum() - lengths
        order = np.argsort(-lengths, kind="stable")
        calls, kept = [], np.empty(self.num_rows, dtype=np.int64)
        start = num_outputs = 0
        while start < len(order):
            width = lengths[order[start]]
            count = int(np.sum(lengths[order[start:]] >= LEAST_FILLED * width))
            branches = order[start : start + count]
            columns = np.minimum(np.arange(width), lengths[branches, None] - 1)
            calls.append(first_key[branches, None] + columns)
            for place, branch in enumerate(branches):
                own = np.arange(num_prefix[branch], lengths[branch])
                kept[self._table[branch, 0] : self._table[branch, 1]] = num_outputs + place * width + own
            num_outputs += count * width
            start += count
        return calls, kept

    @cached_property
    def kept_keys(self) -> Tensor:
        """(T,) int64: index of each row of the packed row in the gathered rows of its own branch."""
        lengths = self.lengths
        first_key = lengths.cumsum() - lengths
        own = [np.arange(k + p, k + n) for k, p, n in zip(first_key, self.num_prefix, lengths, strict=True)]
        kept = np.concatenate(own) if own else np.zeros(0, dtype=np.int64)
        return torch.from_numpy(kept.astype(np.int64)).to(self.varlen.key_rows.device)

    @cached_property
    def boundaries(self) -> dict[str, object]:
        """The sequence boundaries of the gathered row, by the names that transformers' models pass to kernels."""
        varlen = self.varlen
        keys = torch.arange(varlen.key_rows.shape[0], device=varlen.key_rows.device)
        sequence = torch.bucketize(keys, varlen.cu_keys[1:].long(), right=True)
        return {
            "cu_seq_lens_q": varlen.cu_keys,
            "cu_seq_lens_k": varlen.cu_keys,
            "max_length_q": varlen.max_keys,
            "max_length_k": varlen.max_keys,
            "seq_idx": sequence.to(torch.int32)[None],
        }
