"""Integrations with other trainers: parts of fastdpo with the call signatures of those trainers."""

from fastdpo.integrations.linear_dpo_loss import LinearDPOLoss

__all__ = ["LinearDPOLoss"]
