"""Whether a measure grows over a run: its growth from first to last step, with a confidence interval, and a verdict.

In: (step, value) pairs; times come from `as_if_alone`. The first quarter is left out: caches fill and libraries load.
The rest is cut into ten blocks of equal size, and a line is fitted to the medians of the blocks, because neighbouring
values are not independent and a busy machine makes single ones large. Out: growth over the steps that count, with its
95% interval.
"""

import itertools
import statistics
from dataclasses import dataclass

BLOCKS = 10
WARM_UP = 0.25  # of the values
LEAST = 8  # values
T_95 = {2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306}  # Student's t by degrees of freedom

STEADY, GROWS, UNDECIDED = "steady", "grows", "undecided"


@dataclass(frozen=True)
class Trend:
    """The line through a measure's values."""

    level: float  # median of the values that count
    growth: float  # from the first of them to the last
    low: float  # 95% interval of the growth
    high: float
    line: tuple[tuple[float, float], tuple[float, float]]  # its two ends, (step, value)

    def verdict(self, tolerated):
        """STEADY if the growth is surely below `tolerated`, GROWS if it is surely above, else UNDECIDED."""
        if self.low > tolerated:
            return GROWS
        return STEADY if self.high <= tolerated else UNDECIDED


def as_if_alone(times):
    """(step, value) pairs of (step, value, work) triples, as if the machine had been equally busy all the time.

    Args:
        times: a time with that of the same work right before and after, which grows with it on a busy machine.
    """
    usual = statistics.median(work for _, _, work in times)
    return [(step, value * usual / work) for step, value, work in times]


def trend(values):
    """The Trend of (step, value) pairs, LEAST of them or more."""
    counted = values[int(WARM_UP * len(values)) :]
    num = min(BLOCKS, len(counted))
    edges = [round(len(counted) * i / num) for i in range(num + 1)]
    blocks = [counted[start:end] for start, end in itertools.pairwise(edges)]
    x = [statistics.fmean(step for step, _ in block) for block in blocks]
    y = [statistics.median(value for _, value in block) for block in blocks]
    mean_x, mean_y = statistics.fmean(x), statistics.fmean(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
    rest = sum((b - mean_y - slope * (a - mean_x)) ** 2 for a, b in zip(x, y, strict=True))
    error = T_95[num - 2] * (rest / (num - 2) / spread) ** 0.5
    first, last = counted[0][0], counted[-1][0]
    steps = last - first
    ends = tuple((step, mean_y + slope * (step - mean_x)) for step in (first, last))
    level = statistics.median(value for _, value in counted)
    return Trend(level, slope * steps, (slope - error) * steps, (slope + error) * steps, ends)
