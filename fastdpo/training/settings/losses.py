"""The settings of the loss: which losses, their weights, and their parameters. Part of DPOConfig.

Names and defaults are TRL's where TRL has the setting.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fastdpo.losses import (
    DIVERGENCES,
    LOSSES,
    check_combination,
    check_loss_settings,
    losses_where,
)
from fastdpo.training.settings.checks import help_text
from fastdpo.training.settings.trl_names import RENAMED_LOSSES


@dataclass
class LossSettings:
    """Fields of DPOConfig. `check_losses` raises ValueError for values that cannot work, alone or together."""

    beta: float = field(
        default=0.1,
        metadata=help_text("Temperature of the implicit reward, > 0. Larger values stay closer to the reference."),
    )
    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata=help_text(f"One or more of {', '.join(LOSSES)}. Several are added, weighted by loss_weights."),
    )
    loss_weights: list[float] | None = field(
        default=None, metadata=help_text("Weight of each loss in loss_type. Default: 1 each.")
    )
    label_smoothing: float = field(
        default=0.0,
        metadata=help_text(
            "Probability that a preference label is flipped, in [0, 0.5). Used by"
            f" {', '.join(losses_where(lambda loss: loss.smoothed))}; with sigmoid it is conservative DPO."
        ),
    )
    f_divergence_type: str = field(
        default="reverse_kl",
        metadata=help_text(
            f"Divergence that keeps the policy close to the reference: one of {', '.join(DIVERGENCES)}."
        ),
    )
    f_alpha_divergence_coef: float = field(default=0.5, metadata=help_text("The alpha of alpha_divergence."))
    ld_alpha: float | None = field(
        default=None,
        metadata=help_text(
            "LD-DPO: weight, in [0, 1], of the extra tokens of the longer response of each pair. Default: the"
            " same weight as all others."
        ),
    )
    use_weighting: bool = field(
        default=False,
        metadata=help_text("WPO: weight pairs by how typical both responses are of the policy. Does not change sft."),
    )
    discopop_tau: float = field(
        default=0.05,
        metadata=help_text("discopop: width of the step from one loss to the other, in units of beta * margin."),
    )
    gamma_beta_ratio: float = field(
        default=0.25,
        metadata=help_text("simpo: target margin gamma / beta, in nats per token. Use it with a beta of 2 to 10."),
    )
    cpo_alpha: float = field(default=1.0, metadata=help_text("cpo: weight of the negative log-likelihood per token."))

    def check_losses(self) -> None:
        self.loss_type = _names(self.loss_type)
        for name in self.loss_type:
            if name in RENAMED_LOSSES:
                raise ValueError(f"loss_type must not be {name!r}, a former name; instead: {RENAMED_LOSSES[name]}")
        check_loss_settings(self.loss_type, self)
        check_combination(self)


def _names(loss_type: str | list[str]) -> list[str]:
    """Names from a list, or from comma-separated text as on command lines and in older configs of TRL."""
    parts = [loss_type] if isinstance(loss_type, str) else loss_type
    if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
        raise ValueError(f"loss_type must be a name or a list of names, got {loss_type!r}")
    return [name.strip() for part in parts for name in part.split(",")]
