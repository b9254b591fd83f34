"""LossConfig: the fields of DPOConfig that losses read. Any object that has those that a loss reads will do."""

from __future__ import annotations

from typing import Protocol


class LossConfig(Protocol):
    """Meanings and units are at the fields of `fastdpo.DPOConfig`."""

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
