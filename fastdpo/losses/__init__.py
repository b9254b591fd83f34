"""Preference losses: one pure function each, from PairScores to one loss per pair, all named in LOSSES.

Every function takes `(scores, config)` and returns (B,) losses in nats-like units, differentiable in the policy's
log-probs. `config` is anything with the fields that the loss reads (`beta`, `label_smoothing`, ...), usually a
DPOConfig. A reference-free run is one whose reference log-probs are zero; no loss needs to know. Names and formulas
are TRL's where TRL has the loss, so that configs carry over.

    pairwise     losses of one pair against a reference      batch       losses of sorted batches and of rankings
    likelihood   losses of the policy alone                  divergence  f-divergences in place of the KL
    scores       what losses read, and the sum of a run's    release     the original release's function
    registry, checks, settings   names, what can be combined, what losses read of the config
"""

from fastdpo.losses.checks import check_combination, check_loss_settings
from fastdpo.losses.divergence import DIVERGENCES
from fastdpo.losses.registry import (
    BATCH_LOSSES,
    DIVERGENCE_LOSSES,
    LIKELIHOOD_LOSSES,
    LOSSES,
    PER_TOKEN_REWARDS,
    REFERENCE_FREE_LOSSES,
    SMOOTHED,
)
from fastdpo.losses.release import preference_loss
from fastdpo.losses.scores import is_listwise, looks_at_whole_batch, pair_scores, preference_losses
from fastdpo.losses.settings import LossConfig

__all__ = [
    "BATCH_LOSSES",
    "DIVERGENCES",
    "DIVERGENCE_LOSSES",
    "LIKELIHOOD_LOSSES",
    "LOSSES",
    "PER_TOKEN_REWARDS",
    "REFERENCE_FREE_LOSSES",
    "SMOOTHED",
    "LossConfig",
    "check_combination",
    "check_loss_settings",
    "is_listwise",
    "looks_at_whole_batch",
    "pair_scores",
    "preference_loss",
    "preference_losses",
]
