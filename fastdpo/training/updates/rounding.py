"""Rounds updated weights to bf16: fp32 numbers in, a bf16 weight changed in place.

AdamW with a learning rate of 1e-6 changes a weight by about 1e-6 in a step, and bf16 has 8 bits: the bf16 number
nearest to 0.01 + 1e-6 is 0.01 again, and nothing is learned. Two remedies:

stochastic: rounds up or down with the probabilities that keep the mean, so that small updates arrive on average. It
    needs no memory. Forward reads these weights, whose noise does not add up in one direction.
kahan: keeps what rounding has cut off in a second bf16 number, 2 bytes per weight, and adds it before the next update.
    Weight and remainder together have 16 bits or more.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDINGS = ("nearest", "stochastic", "kahan")
_CUT_BITS = 16  # an fp32 number is a bf16 number and 16 more bits


def round_stochastically(exact: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The fp32 tensor in bf16: one of the two neighbours of each number, whose expected value is the number.

    `exact` is used as scratch. Numbers that are not finite stay as they are; larger ones than bf16 has become infinite
    with a probability, as the nearest number would be from half of the last place on.
    """
    bits = exact.view(torch.int32)
    odd = ~exact.isfinite()
    noise = torch.empty_like(bits).random_(0, 1 << _CUT_BITS, generator=generator)
    bits.add_(noise.masked_fill_(odd, 0))
    kept_bits = noise.fill_(-(1 << _CUT_BITS)).masked_fill_(odd, -1)
    bits.bitwise_and_(kept_bits)
    return exact.to(torch.bfloat16)


def split_in_two(exact: Tensor) -> tuple[Tensor, Tensor]:
    """The fp32 tensor as two bf16 tensors: the nearest numbers, and what is missing."""
    nearest = exact.to(torch.bfloat16)
    missing = (exact - nearest).masked_fill_(~nearest.isfinite(), 0.0)
    return nearest, missing.to(torch.bfloat16)


def generator_of(device: torch.device, seed: int, weight: int, update: int) -> torch.Generator:
    """Random numbers for one update of one weight: others for every update, and the same on every process and after a
    resume. The run's own random numbers are not touched."""
    mixed = ((seed * 0x9E3779B1 + weight) * 0x85EBCA6B + update) * 0xC2B2AE35 % (1 << 63)
    return torch.Generator(device).manual_seed(mixed)
