"""A share with its Wilson interval, also for values that come in clusters.

In: values in [0, 1]. Out: their mean, and E. B. Wilson's interval (Journal of the American Statistical Association 22,
1927). For clustered values, the interval uses the effective number of independent values: their number divided by the
design effect (L. Kish, Survey Sampling, 1965).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastdpo.ranking.bradley_terry import normal_quantile
from fastdpo.rewards.intervals import wilson


@dataclass(frozen=True)
class Share:
    """A mean of values in [0, 1]."""

    rate: float
    lower: float
    upper: float
    num: int  # number of values
    num_ties: int = 0  # number of values that are 0.5

    def text(self) -> str:
        """Such as "71.3 % (65.0 to 76.9)"; "ties only" if all values are ties."""
        if self.num_ties == self.num:
            return "ties only"
        return f"{100 * self.rate:.1f} % ({100 * self.lower:.1f} to {100 * self.upper:.1f})"


def share_of(values: NDArray[np.float64], clusters: NDArray[np.int64], confidence: float = 0.95) -> Share:
    """The mean of `values` (N,), N >= 1, with its interval.

    Args:
        clusters: (N,) the same number for values that depend on each other.
    """
    num = len(values)
    rate = float(values.mean())
    _, clusters = np.unique(clusters, return_inverse=True)
    num_clusters = int(clusters.max()) + 1
    independent = float(num)
    if num_clusters < num:
        binomial = rate * (1 - rate) * num
        if binomial > 0:
            design_effect = float((np.bincount(clusters, values - rate) ** 2).sum()) / binomial
            independent = num / max(design_effect, 1.0)
        else:
            independent = float(num_clusters)  # all values are equal: assume full dependence within clusters
    return Share(
        rate, *wilson(rate * independent, independent, normal_quantile(confidence)), num, int((values == 0.5).sum())
    )
