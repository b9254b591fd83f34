"""The load-balancing loss of a mixture-of-experts model in a run: its weight, as in TRL 1.16, and its combination with
a loss that is a sum over a batch's items.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastdpo.metrics import SumAndWeight
from fastdpo.modeling.backbone import bare_model
from fastdpo.modeling.router import has_load_balancing


def router_coefficient(args: Any, model: nn.Module) -> float:
    """`router_aux_loss_coef`, by default from the model's config; 0.0 for models without experts.

    Raises:
        ValueError: a weight is given but the model has no such loss, or batches are split, which changes the loss.
    """
    bare = bare_model(model)
    is_possible = has_load_balancing(bare)
    asked = args.router_aux_loss_coef
    if not is_possible:
        if asked:
            raise ValueError(
                f"router_aux_loss_coef must be None or 0 for {type(bare).__name__}, which has no load-balancing loss,"
                f" got {asked}"
            )
        return 0.0
    of_model = getattr(bare, "router_aux_loss_coef", None) or 0.0
    coefficient = float(of_model if asked is None else asked)
    if coefficient and args.max_tokens_per_microbatch is not None:
        raise ValueError(
            f"max_tokens_per_microbatch must be None with the load-balancing loss of {type(bare).__name__}, got"
            f" {args.max_tokens_per_microbatch!r}: the loss is not a sum over items, so a batch cannot be split; use"
            " gradient_accumulation_steps, which averages it over batches, or router_aux_loss_coef=0"
        )
    if coefficient and args.on_oversized_row == "split":
        raise ValueError(
            f"on_oversized_row must not be 'split' with the load-balancing loss of {type(bare).__name__}, which is not"
            " a sum over sequences, so a row cannot be split; set router_aux_loss_coef=0, or choose 'alone'"
        )
    return coefficient


def with_load_balancing(
    loss: Tensor, aux_loss: Tensor, coefficient: float, num_items: int
) -> tuple[Tensor, dict[str, SumAndWeight]]:
    """A batch's summed loss including the load-balancing loss, (), and the metric of the latter, ().

    Its mean over the batches of a step weights each batch by its items, pairs or tokens.
    """
    metrics: dict[str, SumAndWeight] = {"aux_loss": (aux_loss.detach() * num_items, float(num_items))}
    return loss + coefficient * num_items * aux_loss, metrics
