"""Shares have Wilson's interval, and a wider one where what is counted comes in clusters."""

import numpy as np
import pytest

from fastdpo.ranking.shares import share_of
from fastdpo.rewards.intervals import wilson


def test_independent_values_have_the_plain_interval_and_ties_are_half():
    share = share_of(np.array([1, 1, 0.5, 0]), np.arange(4))
    assert (share.rate, share.num, share.num_ties) == (0.625, 4, 1)
    assert (share.lower, share.upper) == pytest.approx(wilson(2.5, 4))
    assert share.text() == f"62.5 % ({100 * share.lower:.1f} to {100 * share.upper:.1f})"


def test_values_that_are_alike_in_a_cluster_count_once():
    once = share_of(np.array([1.0, 0, 1, 1, 0, 1]), np.arange(6))
    twice = share_of(np.repeat([1.0, 0, 1, 1, 0, 1], 2), np.repeat(np.arange(6), 2))
    assert (twice.lower, twice.upper) == pytest.approx((once.lower, once.upper))
    assert twice.num == 12
    alike = share_of(np.ones(12), np.repeat(np.arange(6), 2))
    assert (alike.lower, alike.upper) == pytest.approx(wilson(6, 6))


def test_clustered_intervals_hold_the_truth_in_93_to_97_percent_of_500_simulations():
    rng, held = np.random.default_rng(0), []
    for _ in range(500):
        of_cluster = np.repeat(rng.random(150), 4)
        decides = np.where(rng.random(600) < 0.6, of_cluster, rng.random(600))
        share = share_of((decides < 0.7).astype(float), np.repeat(np.arange(150), 4))
        held.append(share.lower <= 0.7 <= share.upper)
    assert 0.93 <= np.mean(held) <= 0.97


def test_nothing_but_ties_is_said():
    assert share_of(np.full(3, 0.5), np.arange(3)).text() == "ties only"
