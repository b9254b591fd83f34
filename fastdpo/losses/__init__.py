"""Preference losses: one pure function each, from PairScores to one loss per pair, all named in LOSSES.

Every function takes `(scores, config)` and returns (B,) losses in nats-like units, differentiable in the policy's
log-probs. `config` is anything with the fields that the loss reads (`beta`, `label_smoothing`, ...), usually a
DPOConfig. In a reference-free run the reference log-probs are zero; losses need no special case. Names and formulas are
TRL's for all losses that TRL has, so that configs carry over.

    pairwise     losses of one pair against a reference      batch       losses of sorted batches and of rankings
    likelihood   losses of the policy alone                  divergence  f-divergences in place of the KL
    scores       inputs of losses, and their weighted sum    release     the original release's function
    registry     facts about each loss                       checks, settings   valid settings and combinations
"""

from fastdpo.losses import pairwise, likelihood, batch  # noqa: I001  # each registers its losses, in the order of help
from fastdpo.losses.checks import check_combination, check_loss_settings
from fastdpo.losses.divergence import DIVERGENCES
from fastdpo.losses.registry import LOSSES, Loss, loss, losses_where
from fastdpo.losses.release import preference_loss
from fastdpo.losses.scores import is_listwise, looks_at_whole_batch, pair_scores, preference_losses
from fastdpo.losses.settings import LossConfig

__all__ = [
    "DIVERGENCES",
    "LOSSES",
    "Loss",
    "LossConfig",
    "batch",
    "check_combination",
    "check_loss_settings",
    "is_listwise",
    "likelihood",
    "looks_at_whole_batch",
    "loss",
    "losses_where",
    "pair_scores",
    "pairwise",
    "preference_loss",
    "preference_losses",
]
