"""Deals the rows of an optimizer step to processes, so that all have about equally many tokens.

In: the sizes of a step's rows. Out: which rows each process reads in each of its batches. Every batch has equally many
rows, and the step has the rows it had, so its mean loss does not change.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def deal(sizes: Sequence[int], num_processes: int, num_batches: int) -> list[list[int]]:
    """The rows of each batch, in the order in which processes take turns: batch `b * num_processes + p` is process p's
    batch b.

    Rows go from the largest to the smallest into the batch with the fewest tokens that has space (Graham's rule for
    machines of equal speed). Batches of similar size then run at the same time, because processes that share weights
    or gradients wait for each other in every batch; each time the process with the fewest tokens gets the largest.

    Args:
        sizes: tokens of each row; their number is divisible by the number of batches of all processes.
        num_batches: of each process.
    """
    num_bins = num_processes * num_batches
    assert len(sizes) % num_bins == 0, (len(sizes), num_bins)
    capacity = len(sizes) // num_bins
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    totals = [0] * num_bins
    queue = [(0, index) for index in range(num_bins)]  # already a heap
    for row in sorted(range(len(sizes)), key=lambda row: -sizes[row]):
        _, index = heapq.heappop(queue)
        bins[index].append(row)
        totals[index] += sizes[row]
        if len(bins[index]) < capacity:
            heapq.heappush(queue, (totals[index], index))
    by_size = sorted(range(num_bins), key=lambda index: -totals[index])
    of_process = [0] * num_processes
    dealt: list[list[int]] = []
    for start in range(0, num_bins, num_processes):
        turn: list[list[int]] = [[] for _ in range(num_processes)]
        emptiest = sorted(range(num_processes), key=lambda process: of_process[process])
        for process, index in zip(emptiest, by_size[start : start + num_processes], strict=True):
            turn[process] = sorted(bins[index])
            of_process[process] += totals[index]
        dealt += turn
    return dealt
