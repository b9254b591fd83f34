"""The reference implementation of the head op, in plain PyTorch with plain autograd. Only this one builds (T, V)
logits.

In: arguments that `linear_logps` has validated. Out: TokenLogps. fp64 inputs are computed in fp64, all others in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdpo.ops.head import Head
from fastdpo.types import IGNORE_INDEX, TokenLogps


def reference_linear_logps(
    hidden_states: Tensor,  # (T, H)
    lm_head_weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (T,) int64, or (T, K)
    head: Head,
) -> TokenLogps:
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    logits = hidden_states.to(dtype) @ lm_head_weight.to(dtype).T  # (T, V): the tensor the fast paths never build
    if bias is not None:
        logits = logits + bias.to(dtype)
    logits = logits * head.logit_scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)

    num_vocab = logits.shape[-1]
    keep = labels != IGNORE_INDEX
    in_vocab = (labels >= 0) & (labels < num_vocab)
    column = (labels if labels.dim() == 2 else labels[:, None]).clamp(0, num_vocab - 1)
    label_logits = logits.gather(-1, column).view(labels.shape).where(in_vocab, torch.nan)
    all_logps = logits.log_softmax(-1)
    logps = all_logps.gather(-1, column).view(labels.shape).where(in_vocab, torch.nan)

    probs = all_logps.exp()
    statistics = {
        "lse": lambda: logits.logsumexp(-1),
        "entropy": lambda: -(probs * all_logps.where(probs > 0, 0.0)).sum(-1),
        "mean_logits": lambda: logits.mean(-1),
        "is_top1": lambda: label_logits >= logits.amax(-1).view(-1, *[1] * (labels.dim() - 1)),
        "log_sum_sq_probs": lambda: (2 * all_logps).logsumexp(-1),
    }
    values = {}
    for name in head.outputs:
        value = statistics[name]()
        value = value if name in head.output_grads else value.detach()
        kept = keep if value.dim() == keep.dim() else keep.any(1)
        values[name] = value.where(kept, torch.zeros_like(value))
    return TokenLogps(logps.where(keep, 0.0), **values)
