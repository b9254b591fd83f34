"""Where variable-length attention finds the keys of every branch: the segments of a packed row in, index tensors out.

A branch's keys are its prefix's rows, then its own. The first pair of `packing.py`, prompt [1 2], responses [3 4] and
[5], has segments (0,4, 0,0) (4,5, 0,2):

    rows          0 1 2 3 4
    key_rows      0 1 2 3 | 0 1 4         what the branch does not have itself is there once more
    own_keys      0 1 2 3 6               row 4 is key 6
    copied_keys   4 5                     keys 4 and 5 are further copies of rows 0 and 1
    copy_ends     (2,)                    one round: every row is copied at most once in it
    cu_queries    0 4 5    cu_keys  0 4 7

The gradient of a row is that of its own key plus those of its copies. Within a round no row occurs twice, so that a
sum round by round always adds in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fastdpo.types import VarlenLayout


def varlen_layout(segments: Sequence[tuple[int, int, int, int]]) -> VarlenLayout:
    """Args: segments: per branch query start, query end, prefix start, prefix end; queries cover the row in order."""
    table = np.asarray(segments, dtype=np.int64).reshape(-1, 4)
    lengths = table[:, [3, 1]] - table[:, [2, 0]]  # (N, 2): of prefix, of queries
    run_starts, run_lengths = table[:, [2, 0]].ravel(), lengths.ravel()  # prefix, own rows, prefix, own rows, ...
    within_run = np.arange(run_lengths.sum()) - np.repeat(run_lengths.cumsum() - run_lengths, run_lengths)
    key_rows = within_run + np.repeat(run_starts, run_lengths)
    is_own = np.repeat(np.tile([False, True], len(table)), run_lengths)

    rounds = _rounds(table[:, 2], lengths[:, 0])
    round_of_copy = np.repeat(rounds, lengths[:, 0])
    copied_keys = np.flatnonzero(~is_own)[np.argsort(round_of_copy, kind="stable")]
    num_keys = lengths.sum(1)
    return VarlenLayout(
        key_rows=torch.from_numpy(key_rows),
        own_keys=torch.from_numpy(np.flatnonzero(is_own)),
        copied_keys=torch.from_numpy(copied_keys),
        cu_queries=torch.from_numpy(np.concatenate([[0], lengths[:, 1].cumsum()]).astype(np.int32)),
        cu_keys=torch.from_numpy(np.concatenate([[0], num_keys.cumsum()]).astype(np.int32)),
        max_queries=int(lengths[:, 1].max(initial=0)),
        max_keys=int(num_keys.max(initial=0)),
        copy_ends=tuple(np.bincount(round_of_copy).cumsum().tolist()),
    )


def _rounds(prefix_starts: np.ndarray, prefix_lengths: np.ndarray) -> np.ndarray:
    """(N,) how many branches before this one have the same prefix; 0 for those without."""
    seen: dict[int, int] = {}
    rounds = np.zeros(len(prefix_starts), dtype=np.int64)
    for index, (start, length) in enumerate(zip(prefix_starts.tolist(), prefix_lengths.tolist(), strict=True)):
        if length:
            rounds[index] = seen.get(start, 0)
            seen[start] = seen.get(start, 0) + 1
    return rounds
