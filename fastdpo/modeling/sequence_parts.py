"""The part of a packed batch that one process computes, and the whole batch's results from all parts.

In: a batch with shares (`data/batches/shares.py`). Out: the batch with the rows of this process alone; and from the
log-probs of its tokens, those of all tokens and sequences, equal on every process and differentiable.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fastdpo.modeling.sequence_group import SequenceGroup
from fastdpo.ops.token_sums import Tokens, token_sums
from fastdpo.types import PackedBatch


def own_part(batch: PackedBatch, group: SequenceGroup) -> PackedBatch:
    """The batch with tokens, positions, uses, and the head's rows and labels of this process; `logit_rows` count from
    its first token. Everything else is that of the whole batch."""
    assert batch.shares is not None
    shares, tokens = batch.shares, group.share(batch.input_ids.shape[1])
    rows = shares.order[shares.ends[group.rank] : shares.ends[group.rank + 1]]
    return replace(
        batch,
        input_ids=batch.input_ids[:, tokens],
        position_ids=batch.position_ids[:, tokens],
        uses=None if batch.uses is None else batch.uses[:, tokens],
        logit_rows=batch.logit_rows.index_select(0, rows) - tokens.start,
        labels=batch.labels.index_select(0, rows),
    )


def joined_outputs(
    found: Mapping[str, Tensor], batch: PackedBatch, group: SequenceGroup, impl: str
) -> dict[str, Tensor]:
    """
    Args:
        found: "logps" and statistics of the head's rows on this process, each (r,).
        batch: the whole batch.
    Returns:
        "logps" and the statistics of all R rows, and "sums" and "lengths" of the sequences.
    """
    assert batch.shares is not None
    logps, names = found["logps"], [name for name in found if name != "logps"]
    statistics = (
        torch.stack([found[name].to(logps.dtype) for name in names]) if names else logps.new_empty(0, len(logps))
    )
    logps, statistics = group.gather_rows(logps, statistics, batch.shares)
    place = Tokens(batch.cu_seqlens, batch.token_rows)
    (sums,), lengths = token_sums([logps], place, labels=batch.labels, impl=impl)
    whole = {name: row.to(found[name].dtype) for name, row in zip(names, statistics, strict=True)}
    return {"sums": sums, "lengths": lengths, "logps": logps, **whole}
