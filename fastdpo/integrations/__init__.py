"""Seats inside other trainers: the parts of fastdpo behind the signatures that their users already call."""

from fastdpo.integrations.linear_dpo_loss import LinearDPOLoss

__all__ = ["LinearDPOLoss"]
