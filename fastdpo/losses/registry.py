"""All losses by name, and what each kind of loss can be combined with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastdpo.losses.batch import aot, aot_unpaired, plackett_luce
from fastdpo.losses.likelihood import cpo, orpo, sft, simpo
from fastdpo.losses.pairwise import (
    apo_down,
    apo_zero,
    bco_pair,
    discopop,
    exo_pair,
    hinge,
    ipo,
    nca_pair,
    robust,
    sigmoid,
    sigmoid_norm,
    sppo_hard,
)
from fastdpo.types import PairScores

LOSSES: dict[str, Callable[[PairScores, Any], Tensor]] = {
    "sigmoid": sigmoid,
    "hinge": hinge,
    "ipo": ipo,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "robust": robust,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
    "sft": sft,
    "sigmoid_norm": sigmoid_norm,
    "simpo": simpo,
    "orpo": orpo,
    "cpo": cpo,
    "plackett_luce": plackett_luce,
}
# Losses in which the loss of a pair depends on the other pairs of its batch: none of these is the sum of its parts, so
# their batches are never split, and their gradient is not made in forward.
BATCH_LOSSES = ("aot", "aot_unpaired")
REFERENCE_FREE_LOSSES = ("simpo", "orpo", "cpo")
LISTWISE_LOSSES = ("plackett_luce",)  # means over rankings, whose stages are the pairs
TOKEN_LOSSES = ("sft",)  # means over tokens and nothing else: no comparison, so no reference, divergence or pair weight
LIKELIHOOD_LOSSES = (*TOKEN_LOSSES, "orpo", "cpo")  # hold a mean over the chosen tokens of the optimizer step
LENGTH_NORMALIZED = ("ipo", "sigmoid_norm", "simpo", "orpo")  # compare means over tokens: length itself earns nothing
PER_TOKEN_REWARDS = ("simpo", "orpo")  # losses whose reward is beta times the log-prob per token
SMOOTHED = ("sigmoid", "exo_pair", "robust", "aot", "aot_unpaired", "simpo", "cpo")  # read label_smoothing
# compare the two ratios alone, so that what f-DPO's reward has of the prompt cancels
DIVERGENCE_LOSSES = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", *LISTWISE_LOSSES)
