"""The load-balancing loss of mixture-of-experts models, over the tokens that a batch stands for.

In: router logits of every layer, and how often each position counts. Out: a scalar. A prompt that two responses share
is computed once and counts twice, so that packed and padded rows give the number that transformers' own models compute
on padded rows, chosen and rejected in rows of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def has_load_balancing(bare: Any) -> bool:
    """Whether transformers' forward of this model offers an auxiliary loss of the form below."""
    config = bare.config.get_text_config()
    names = ("num_experts", "num_experts_per_tok")
    return hasattr(config, "output_router_logits") and all(isinstance(getattr(bare, name, None), int) for name in names)


def load_balancing_loss(router_logits: Sequence[Tensor], uses: Tensor, num_experts_per_token: int) -> Tensor:
    """`E * sum_e f_e * P_e`, f_e the share of tokens that expert e gets, P_e its mean probability. Switch Transformer,
    arXiv 2101.03961, eq. 4-6.

    As transformers has it, f counts all of a token's `num_experts_per_token` experts, and both are means over the
    tokens of all layers together. Balanced routing gives `num_experts_per_token`. Not a sum over pairs: the loss of a
    batch is not the mean of its parts'.

    Args:
        router_logits: (N, E) of every layer that has experts.
        uses: (N,) how often each position counts.
    Returns:
        (), fp32, differentiable through the probabilities.
    Raises:
        ValueError: the model's router logits have another form.
    """
    if not router_logits or any(not isinstance(logits, Tensor) or logits.dim() != 2 for logits in router_logits):
        raise ValueError(
            "router_aux_loss_coef must be 0 for this model: it does not give router logits as (tokens, experts)"
        )
    weights = uses.float().to(router_logits[0].device)
    num_experts = router_logits[0].shape[-1]
    assigned = torch.zeros(num_experts, device=weights.device)
    probability = torch.zeros(num_experts, device=weights.device)
    for logits in router_logits:
        probs = logits.to(weights.device).float().softmax(-1)  # (N, E)
        chosen = probs.topk(num_experts_per_token, dim=-1).indices  # (N, k)
        assigned = assigned.index_add(0, chosen.flatten(), weights.repeat_interleave(num_experts_per_token))
        probability = probability + (weights[:, None] * probs).sum(0)  # a matmul would be in autocast's dtype
    num_tokens = (weights.sum() * len(router_logits)).clamp(min=1)
    return num_experts * ((assigned / num_tokens) * (probability / num_tokens)).sum()
