"""Figures with standard errors, and the bound on the frontier, against what is known in closed form."""

import itertools
import math

import pytest
import torch

from fastdpo.alignment.results import Estimate, Ordering, best_frontier


def test_an_estimate_is_the_mean_and_its_standard_error():
    estimate = Estimate.of([1.0, 2.0, 3.0, 6.0])
    assert estimate.mean == 3
    assert estimate.stderr == pytest.approx(math.sqrt(14 / 3 / 4))
    assert Estimate.of(torch.tensor([True, False])) == Estimate(0.5, 0.5)
    assert estimate.text(1) == "3.0 ± 1.1"


def test_one_value_has_no_standard_error():
    with pytest.raises(ValueError, match=r"values must hold at least 2 .*got 1"):
        Estimate.of([1.0])


def test_the_standard_errors_of_a_difference_add_in_squares():
    difference = Estimate(5.0, 3.0) - Estimate(1.0, 4.0)
    assert difference == Estimate(4.0, 5.0)


@pytest.mark.parametrize(
    ("difference", "num_stderrs", "holds"),
    [
        (Estimate(1.0, 0.4), 2.5, True),
        (Estimate(1.0, 0.5), 2.0, False),
        (Estimate(-1.0, 0.1), -10.0, False),
        (Estimate(0.0, 0.0), 0.0, False),
        (Estimate(1.0, 0.0), math.inf, True),
        (Estimate(-1.0, 0.0), -math.inf, False),
    ],
)
def test_an_ordering_holds_by_more_than_two_standard_errors(difference, num_stderrs, holds):
    ordering = Ordering("a above b", difference)
    assert ordering.num_stderrs == pytest.approx(num_stderrs)
    assert ordering.holds is holds


def test_the_best_frontier_of_gaussian_rewards_is_the_square_root_of_twice_the_kl():
    rewards = torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    points = best_frontier(rewards.tolist())
    assert points[-1][0] > 2
    for kl, reward in points:
        if kl > 1e-3:
            assert reward == pytest.approx(math.sqrt(2 * kl), rel=0.05)


def test_the_best_frontier_starts_at_the_reference_and_rises():
    points = best_frontier([0.0, 1.0] * 500)
    assert points[0] == (0.0, 0.5)
    assert all(a[0] <= b[0] and a[1] <= b[1] for a, b in itertools.pairwise(points))
    assert points[-1][0] == pytest.approx(math.log(2), abs=0.01)  # all mass on the better half
    assert points[-1][1] == pytest.approx(1.0, abs=0.01)


def test_the_best_frontier_ends_where_too_few_samples_carry_it():
    rewards = [0.0] * 1000 + [5.0] * 20
    assert max(reward for _, reward in best_frontier(rewards, min_samples=50)) < 5 * 0.7
