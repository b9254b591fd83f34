"""Confidence intervals of shares."""

from __future__ import annotations

import math

Z_95 = 1.959963984540054  # of the normal distribution, for 95%


def wilson(successes: float, trials: float, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927): lower and upper end, (0, 1) without trials.

    Args:
        successes: a tie counts one half.
    """
    if trials <= 0:
        return 0.0, 1.0
    share, weight = successes / trials, z * z / trials
    middle = (share + weight / 2) / (1 + weight)
    half = z * math.sqrt(share * (1 - share) / trials + weight / (4 * trials)) / (1 + weight)
    # rounding must not leave the share outside: a plot draws bars of share - lower and upper - share
    return max(min(middle - half, share), 0.0), min(max(middle + half, share), 1.0)
