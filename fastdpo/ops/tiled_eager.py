"""Forward values and gradients of the logits at once, in pure PyTorch, for as many rows as fit the caller's buffer.

In: validated tensors of one dtype and a buffer (T, V). Out: the result of `tiled_forward`; D, eq. (9), in the buffer.
The logits of all rows are one matmul; the softmax then runs on a few rows at a time, while they are in the CPU cache.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastdpo.ops.head import ALWAYS, Head
from fastdpo.ops.matmul import operand, operand_blocks
from fastdpo.ops.tiled import EXP_FLOOR, fill_uncapped
from fastdpo.types import ELSEWHERE, IGNORE_INDEX

WORKSPACE_BYTES = 2**25  # for D of the rows whose gradients are made in forward
GROUP_BYTES = 2**28  # at most, where the rows of one group need more
SLICE_ELEMENTS = 2**19  # logits that pass through the softmax at once: 2 MiB of fp32 stay in a core's cache


def tiled_forward_with_grads(
    out: Tensor,  # (T, V) fp32 or fp64, any contents
    hidden_states: Tensor,  # (T, H)
    lm_head_weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (T,) int64
    head: Head,
    combine: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
    adapter_weight: Tensor | None = None,  # (V, r), for hidden_states (T, H + r)
) -> dict[str, Tensor]:
    """The values named in ALWAYS and in `head.outputs`, each (T,); fills `out` with D.

    Any k_t near lse_t works in (9) and (10). Here it is lse_t itself, because D comes from a softmax: "lse_whole" is
    lse and "lse_rest" is zero. A label outside [0, V) gives nan in both.

    If these are the logits of a part of a vocabulary, `combine` returns the values of the whole one, and D is that
    part's.
    """
    T, V = out.shape
    rows_operand = operand(hidden_states)
    for vocab in operand_blocks(lm_head_weight):
        weight = operand(lm_head_weight[vocab])
        adapter = None if adapter_weight is None else operand(adapter_weight[vocab]).T
        fill_uncapped(out[:, vocab], rows_operand, weight.T, None if bias is None else bias[vocab], head, adapter)
        del weight  # where it is a cast, before the next one is made

    step = max(1, SLICE_ELEMENTS // V)
    keep = labels != IGNORE_INDEX
    found = []
    for row in range(0, T, step):
        rows = slice(row, row + step)
        found.append(_softmax(out[rows], labels[rows], head))
        if combine is None:
            _subtract_label(out[rows], labels[rows], found[-1])
    values = {name: torch.cat([part[name] for part in found]).masked_fill_(~keep, 0) for name in found[0]}
    if combine is not None:
        part_lse = values["lse_whole"]
        values = combine(values)
        out.mul_(torch.exp(part_lse - values["lse_whole"])[:, None])
        out.masked_fill_((part_lse == -torch.inf)[:, None], 0.0)  # a part whose logits are all -inf
        _subtract_label(out, labels, values)
    # masked_fill only if needed: on the CPU ignored rows are already dropped
    if out.device.type != "cpu" or not bool(keep.all()):
        out.masked_fill_(~keep[:, None], 0.0)
    values.pop("label_slope", None)
    return values


def _softmax(z: Tensor, labels: Tensor, head: Head) -> dict[str, Tensor]:
    """Turns logits before the softcap into p (1 - u^2) in place, and returns the rows' values, eq. (4) to (7)."""
    slope = None
    if head.softcap is not None:
        z.div_(head.softcap).tanh_()
        slope = 1 - z.square()
        z.mul_(head.softcap)
    column = labels.clamp(0, z.shape[1] - 1)[:, None]
    label_logit = z.gather(1, column)[:, 0].where((labels >= 0) & (labels < z.shape[1]), torch.nan)
    row_max = z.amax(1)
    mean_logits = z.mean(1) if "mean_logits" in head.outputs else None
    below_max = (z - row_max[:, None]).clamp_(min=EXP_FLOOR) if "entropy" in head.outputs else None  # finite: p is 0
    probs = torch.softmax(z, 1, out=z)
    log_sum = -probs.amax(1).log()  # the largest probability is 1 / sum exp(z - max)
    logps = (label_logit - row_max) - log_sum
    lse = torch.where(row_max == -torch.inf, row_max, row_max + log_sum)
    values = {"logps": logps, "lse_whole": lse, "lse_rest": torch.zeros_like(logps)}
    values |= {"lse": lse.clone(), "is_top1": label_logit >= row_max, "max_logit": row_max}
    if mean_logits is not None:
        values["mean_logits"] = mean_logits
    if below_max is not None:  # log S - sum of p (z - max): two sums without cancelling, and no log for each id
        values["entropy"] = log_sum - below_max.mul_(probs).sum(1)
    if "log_sum_sq_probs" in head.outputs:
        values["log_sum_sq_probs"] = probs.square().sum(1).log()
    values = {name: values[name] for name in (*ALWAYS, *head.outputs)}
    if slope is not None:
        probs.mul_(slope)
        values["label_slope"] = slope.gather(1, column)[:, 0]
    return values


def _subtract_label(d: Tensor, labels: Tensor, values: dict[str, Tensor]) -> None:
    """Writes (14) at the label: (p - 1) exp(r) (1 - u^2), without cancelling where p is nearly 1."""
    at_label = torch.expm1(values["logps"]) * values["lse_rest"].exp()
    if "label_slope" in values:
        at_label = at_label * values["label_slope"]
    column = labels.clamp(0, d.shape[1] - 1)[:, None]
    at_label = at_label.where(labels != ELSEWHERE, d.gather(1, column)[:, 0])
    d.scatter_(1, column, at_label[:, None])
