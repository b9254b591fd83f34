"""Preference losses straight from hidden states, with the calls of Liger's chunked losses.

dpo             DPO and its relatives           base    settings, the reference, the head op
reference_free  CPO, SimPO, ORPO                pairs   the call that losses of pairs share
kto             KTO, on single responses        rows    the positions that reach the head
"""

from fastdpo.integrations.linear_losses.dpo import LINEAR_DPO_LOSSES, LinearDPOLoss
from fastdpo.integrations.linear_losses.kto import LinearKTOLoss
from fastdpo.integrations.linear_losses.reference_free import LinearCPOLoss, LinearORPOLoss, LinearSimPOLoss

__all__ = [
    "LINEAR_DPO_LOSSES",
    "LinearCPOLoss",
    "LinearDPOLoss",
    "LinearKTOLoss",
    "LinearORPOLoss",
    "LinearSimPOLoss",
]
