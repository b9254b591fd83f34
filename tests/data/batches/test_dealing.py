"""Rows of a step are dealt to processes so that none has much more to do than another."""

import numpy as np
import pytest

from fastdpo.data.batches.dealing import deal


def loads(sizes, dealt, num_processes):
    """(batches of a process, processes) tokens."""
    return np.array([sum(sizes[row] for row in rows) for rows in dealt]).reshape(-1, num_processes)


def test_the_largest_row_is_put_beside_the_smallest():
    assert deal([10, 20, 30, 40], 2, 1) == [[0, 3], [1, 2]]
    # batches of one row: the first two rounds are each of similar sizes, and each process has one large and one small
    assert deal([10, 20, 30, 40], 2, 2) == [[3], [2], [0], [1]]


@pytest.mark.parametrize(("num_processes", "num_batches", "batch_size"), [(2, 1, 4), (8, 1, 4), (4, 4, 2), (8, 8, 1)])
def test_every_row_is_dealt_once_and_processes_have_about_equal_tokens(num_processes, num_batches, batch_size):
    rng = np.random.default_rng(0)
    before, after, per_round = [], [], []
    for _ in range(20):
        sizes = np.exp(rng.normal(6, 0.6, num_processes * num_batches * batch_size)).astype(int).tolist()
        dealt = deal(sizes, num_processes, num_batches)
        assert [len(rows) for rows in dealt] == [batch_size] * num_processes * num_batches
        assert sorted(row for rows in dealt for row in rows) == list(range(len(sizes)))
        in_order = np.arange(len(sizes)).reshape(-1, batch_size).tolist()
        for totals, where in (
            (loads(sizes, in_order, num_processes), before),
            (loads(sizes, dealt, num_processes), after),
        ):
            where.append(totals.sum(0).max() / totals.sum(0).mean())
        per_round.append(
            loads(sizes, dealt, num_processes).max(1).sum() / loads(sizes, in_order, num_processes).max(1).sum()
        )
    assert np.mean(after) - 1 < 0.3 * (np.mean(before) - 1)  # of the time that the slowest process takes too long
    assert np.mean(per_round) < 1  # processes that wait for each other after every batch wait less too


def test_equal_rows_are_left_to_one_order():
    assert deal([5] * 8, 2, 2) == deal([5] * 8, 2, 2)
    assert sorted(map(len, deal([5] * 8, 2, 2))) == [2, 2, 2, 2]
