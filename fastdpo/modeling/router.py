"""The load-balancing loss of mixture-of-experts models, over the tokens of all sequences in a batch.

In: router logits of every layer, and how often each position counts. Out: a scalar. A prompt shared by two responses is
computed once and counts twice, so packed and padded rows give the same loss as transformers' own models on padded rows
with chosen and rejected in separate rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def has_load_balancing(bare: Any) -> bool:
    """Whether transformers' forward of this model offers an auxiliary loss of the form below."""
    config = bare.config.get_text_config()
    names = ("num_experts", "num_experts_per_tok")
    return hasattr(config, "output_router_logits") and all(isinstance(getattr(bare, name, None), int) for name in names)


def load_balancing_loss(
    router_logits: Sequence[Tensor],
    uses: Tensor,
    num_experts_per_token: int,
    total: Callable[[Tensor], Tensor] = lambda numbers: numbers,
) -> Tensor:
    """`E * sum_e f_e * P_e`, f_e the share of tokens that expert e gets, P_e its mean probability. Switch Transformer,
    arXiv 2101.03961, eq. 4-6.

    As in transformers, f counts all of a token's `num_experts_per_token` experts, and both are means over the tokens of
    all layers together. Balanced routing gives `num_experts_per_token`. This is not a sum over pairs: the loss of a
    batch is not the mean of the losses of its parts.

    Args:
        router_logits: (N, E) for every layer with experts.
        uses: (N,) how often each position counts.
        total: sums over the processes that hold parts of the N tokens, differentiable.
    Returns:
        (), fp32, differentiable through the probabilities.
    Raises:
        ValueError: the model's router logits have another shape.
    """
    if not router_logits or any(not isinstance(logits, Tensor) or logits.dim() != 2 for logits in router_logits):
        raise ValueError(
            "router_aux_loss_coef must be 0 for this model, whose router logits do not have the shape (tokens, experts)"
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
    num_tokens = weights.sum() * len(router_logits)
    assigned, probability, num_tokens = total(torch.cat([assigned, probability, num_tokens[None]])).split(
        [num_experts, num_experts, 1]
    )
    num_tokens = num_tokens.clamp(min=1)
    return num_experts * ((assigned / num_tokens) * (probability / num_tokens)).sum()
