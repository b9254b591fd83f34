"""LossConfig: the fields of DPOConfig that losses read. Any object with the fields that a loss reads works."""

from __future__ import annotations

from typing import Protocol


class LossConfig(Protocol):
    """See the fields of `fastdpo.DPOConfig` for meanings and units."""

    loss_type: list[str]
    loss_weights: list[float] | None
    beta: float
    label_smoothing: float
    discopop_tau: float
    gamma_beta_ratio: float
    cpo_alpha: float
    f_divergence_type: str
    f_alpha_divergence_coef: float
    ld_alpha: float | None
    use_weighting: bool
