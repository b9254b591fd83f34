"""Index tensors with which variable-length attention finds the keys of every branch: segments of a packed row in.

A branch's keys are its prefix's rows, then its own. The first pair of `packing.py`, prompt [1 2], responses [3 4] and
[5], has segments (0,4, 0,0) (4,5, 0,2):

    rows          0 1 2 3 4
    key_rows      0 1 2 3 | 0 1 4         the prefix rows are repeated for the branch
    row_keys      0 4 | 1 5 | 2 | 3 | 6   rows 0 and 1 are two keys each, row 4 is key 6
    row_ends      0 2 4 5 6 7
    cu_queries    0 4 5    cu_keys  0 4 7

The gradient of a row is the sum over its keys, in this order.
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
    num_keys = lengths.sum(1)
    keys_of_rows = np.bincount(key_rows, minlength=lengths[:, 1].sum())
    return VarlenLayout(
        key_rows=torch.from_numpy(key_rows),
        row_keys=torch.from_numpy(np.argsort(key_rows, kind="stable")),
        row_ends=torch.from_numpy(np.concatenate([[0], keys_of_rows.cumsum()])),
        cu_queries=torch.from_numpy(np.concatenate([[0], lengths[:, 1].cumsum()]).astype(np.int32)),
        cu_keys=torch.from_numpy(np.concatenate([[0], num_keys.cumsum()]).astype(np.int32)),
        max_queries=int(lengths[:, 1].max(initial=0)),
        max_keys=int(num_keys.max(initial=0)),
    )
