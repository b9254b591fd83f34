"""The shares of processes that compute one packed row together: a packed batch in, the same batch with its shares out.

The T tokens are cut into equal parts, in order. A process computes the layers of its part, and the head for the rows
whose hidden state is in its part. The two pairs of `packing.py`, on two processes, with a tenth token as padding:

    tokens        0 1 2 3 4 | 5 6 7 8 9
    logit_rows    1 2 1 5 5 7           rows r = 0, 1, 2 have their hidden state on the first process
    order         0 1 2 3 4 5    ends  0 3 6
    places        0 1 2 3 4 5           of row r among the gathered rows, if each process sends the three of the longest

Refuses rows that cannot be cut into equal parts: the collator pads them.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from fastdpo.types import PackedBatch, RowShares


def with_shares(batch: PackedBatch, num_processes: int) -> PackedBatch:
    """The packed batch, divided over `num_processes`; the batch itself for one.

    Raises:
        ValueError: the batch is padded, or its tokens cannot be divided equally.
    """
    if num_processes == 1:
        return batch
    num_tokens = batch.input_ids.numel()
    if not batch.is_packed or num_tokens % num_processes:
        what = f"{num_tokens} tokens" if batch.is_packed else "a padded batch"
        raise ValueError(
            f"batch must be packed, with a number of tokens that {num_processes} processes can divide, got {what}"
        )
    process = batch.logit_rows // (num_tokens // num_processes)  # that has the hidden state of each row
    order = process.argsort(stable=True)
    ends = torch.nn.functional.pad(process.bincount(minlength=num_processes).cumsum(0), (1, 0))
    longest = int(ends.diff().max())
    within = torch.empty_like(order)
    within[order] = torch.arange(len(order)) - ends[process[order]]
    return replace(batch, shares=RowShares(order, tuple(ends.tolist()), process * longest + within))
