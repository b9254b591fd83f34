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
    labels: Tensor,  # (T,) int64
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
    column = labels.clamp(0, num_vocab - 1)[:, None]
    label_logits = logits.gather(-1, column)[:, 0].where(in_vocab, torch.nan)
    all_logps = logits.log_softmax(-1)
    logps = all_logps.gather(-1, column)[:, 0].where(in_vocab, torch.nan)

    probs = all_logps.detach().exp()
    statistics = {
        "lse": lambda: logits.logsumexp(-1),
        "entropy": lambda: -torch.where(probs > 0, probs * all_logps, 0.0).sum(-1),
        "mean_logits": lambda: logits.mean(-1),
        "is_top1": lambda: label_logits >= logits.amax(-1),
        "log_sum_sq_probs": lambda: (2 * all_logps).logsumexp(-1),
    }
    values = {name: statistics[name]().detach() for name in head.outputs}
    return TokenLogps(
        logps.where(keep, 0.0), **{n: value.where(keep, torch.zeros_like(value)) for n, value in values.items()}
    )
