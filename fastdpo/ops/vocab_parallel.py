"""The head's values over a vocabulary that is cut over processes, from those of every part.

In: what an engine computes from this process's rows of the weight. Out: the values of the whole vocabulary, the same on
every process. The processes exchange a few numbers per row, never logits or weights. kernels/README.md derives
equations (17) to (20).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastdpo.ops.head import ALWAYS, Head
from fastdpo.ops.shard import Shard
from fastdpo.types import ELSEWHERE, IGNORE_INDEX

# What an output needs from every process besides the values in ALWAYS; "lse" follows from those.
EXCHANGED: dict[str, tuple[str, ...]] = {
    "lse": (),
    "entropy": ("entropy",),
    "mean_logits": ("mean_logits",),
    "is_top1": ("is_top1", "max_logit"),
    "log_sum_sq_probs": ("log_sum_sq_probs",),
}


def combined(shard: Shard, values: dict[str, Tensor], labels: Tensor, outputs: Sequence[str]) -> dict[str, Tensor]:
    """eq. (17) and (18): the values of the whole vocabulary from those of every part.

    Args:
        values: (T,) each: those in ALWAYS, what EXCHANGED names for `outputs`; others pass through.
        labels: (T,) of `Shard.local`.
    """
    names = list(ALWAYS) + [name for output in outputs for name in EXCHANGED[output]]
    logps = values["logps"].masked_fill(labels == ELSEWHERE, torch.nan)
    own = torch.stack([logps, *(values[name].to(logps.dtype) for name in names[1:])])  # (k, T)
    every = own.new_empty(shard.group.size(), *own.shape)
    dist.all_gather(list(every.unbind(0)), own, group=shard.group)
    part = dict(zip(names, every.unbind(1), strict=True))  # (processes, T) each

    whole, rest = part["lse_whole"], part["lse_rest"]
    rest = rest.masked_fill(whole == -torch.inf, 0.0)  # a part without any probability
    largest = (whole + rest).argmax(0, keepdim=True)  # (1, T)
    top_whole, top_rest = whole.gather(0, largest), rest.gather(0, largest)
    above = (whole - top_whole) + (rest - top_rest)  # lse of each part less the largest, <= 0
    log_sum = above.exp().scatter(0, largest, 0.0).sum(0).log1p()  # (T,)
    carry = (top_rest[0] + log_sum).round()
    owner = (~part["logps"].isnan()).to(torch.int8).argmax(0, keepdim=True)
    found = {
        "logps": (part["logps"].gather(0, owner) + above.gather(0, owner))[0] - log_sum,
        "lse_whole": top_whole[0] + carry,
        "lse_rest": (top_rest[0] - carry) + log_sum,
    }
    weight = (above - log_sum).exp()  # (processes, T): probability of each part
    for output in outputs:
        found[output] = _statistic(shard, output, part, above - log_sum, weight, owner, found)
    keep = labels != IGNORE_INDEX
    return values | {name: value.masked_fill(~keep, 0) for name, value in found.items()}


def _statistic(
    shard: Shard,
    output: str,
    part: dict[str, Tensor],  # (processes, T) each
    log_weight: Tensor,  # (processes, T)
    weight: Tensor,  # its exponential
    owner: Tensor,  # (1, T) process that holds the label
    found: dict[str, Tensor],
) -> Tensor:
    """eq. (18), (T,)."""
    if output == "lse":
        return found["lse_whole"] + found["lse_rest"]
    if output == "mean_logits":
        sizes = torch.tensor(shard.sizes, dtype=weight.dtype, device=weight.device)
        return (sizes[:, None] * part["mean_logits"]).sum(0) / shard.num_vocab
    if output == "entropy":  # a part without probability adds nothing: 0 and not 0 * inf
        return torch.where(weight > 0, weight * (part["entropy"] - log_weight), 0.0).sum(0)
    if output == "log_sum_sq_probs":
        logs = part["log_sum_sq_probs"] + 2 * log_weight
        return torch.where(weight > 0, logs, -torch.inf).logsumexp(0)
    largest = part["max_logit"].amax(0)
    return (part["is_top1"].gather(0, owner)[0] > 0) & (part["max_logit"].gather(0, owner)[0] >= largest)


def sharded(engine: Any, shard: Shard | None) -> Any:
    """The Engine, with forward passes over the whole vocabulary; `labels` are those of `Shard.local`."""
    if shard is None:
        return engine

    def local(head: Head) -> Head:
        names = dict.fromkeys(name for output in head.outputs for name in EXCHANGED[output])
        return replace(head, outputs=tuple(names))

    def forward(
        hidden_states: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, head: Head, **adapter: Any
    ) -> Any:
        values = engine.forward(hidden_states, weight, bias, labels, local(head), **adapter)
        return combined(shard, values, labels, head.outputs)

    def forward_with_grads(
        out: Tensor,
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        head: Head,
        **adapter: Any,
    ) -> Any:
        def combine(values: dict[str, Tensor]) -> dict[str, Tensor]:
            return combined(shard, values, labels, head.outputs)

        return engine.forward_with_grads(out, hidden_states, weight, bias, labels, local(head), combine, **adapter)

    return engine._replace(forward=forward, forward_with_grads=forward_with_grads)
