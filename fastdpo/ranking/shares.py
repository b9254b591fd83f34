"""A share with its Wilson interval, also where what is counted comes in clusters.

In: a value in [0, 1] for each thing counted. Out: its mean, and the interval that E. B. Wilson gives (Journal of the
American Statistical Association 22, 1927). In clusters the interval is that of as many independent things as carry the
same information: their number divided by the design effect (L. Kish, Survey Sampling, 1965).
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
    num: int  # of what is counted
    num_ties: int = 0  # of them, those of the value 0.5

    def text(self) -> str:
        """As 71.3 % (65.0 to 76.9), or where nothing else was seen: ties only."""
        if self.num_ties == self.num:
            return "ties only"
        return f"{100 * self.rate:.1f} % ({100 * self.lower:.1f} to {100 * self.upper:.1f})"


def share_of(values: NDArray[np.float64], clusters: NDArray[np.int64], confidence: float = 0.95) -> Share:
    """The mean of `values` (N,), N >= 1, with its interval.

    Args:
        clusters: (N,) one number for all values that belong together.
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
            independent = float(num_clusters)  # all alike, so perhaps by cluster
    return Share(
        rate, *wilson(rate * independent, independent, normal_quantile(confidence)), num, int((values == 0.5).sum())
    )
