"""Integrations with other trainers: parts of fastdpo with the call signatures of those trainers."""

from fastdpo.integrations.linear_losses import (
    LinearCPOLoss,
    LinearDPOLoss,
    LinearKTOLoss,
    LinearORPOLoss,
    LinearSimPOLoss,
)

__all__ = ["LinearCPOLoss", "LinearDPOLoss", "LinearKTOLoss", "LinearORPOLoss", "LinearSimPOLoss"]
