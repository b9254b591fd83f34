"""Metrics weigh every pair and every token alike, however the batches were cut."""

import pytest
import torch

from fastdpo.metrics import MetricMeans, pair_metrics, token_metrics
from fastdpo.types import PairLogps, PairScores, SequenceLogps, TokenLogps


def scores(*rows):
    return PairScores(*torch.tensor(rows, dtype=torch.float32).unbind(1))


def test_pair_metrics_of_two_batches_are_the_mean_over_their_pairs():
    rows = [(-1.0, -2.0, -1.5, -1.5), (-3.0, -1.0, -2.0, -2.0), (-1.0, -1.0, -1.0, -1.0)]
    means = MetricMeans()
    means.add(pair_metrics(scores(*rows[:2]), beta=0.5))
    means.add(pair_metrics(scores(rows[2]), beta=0.5))
    values = means.pop()
    assert values["rewards/chosen"] == pytest.approx(0.5 * (0.5 - 1.0 + 0.0) / 3)
    assert values["rewards/rejected"] == pytest.approx(0.5 * (-0.5 + 1.0 + 0.0) / 3)
    assert values["rewards/accuracies"] == pytest.approx(1 / 3)  # a tie does not count as right
    assert values["rewards/margins"] == pytest.approx(0.5 * (1.0 - 2.0 + 0.0) / 3)
    sigmoid = lambda x: 1 / (1 + torch.tensor(-x).exp().item())  # noqa: E731
    assert values["rewards/weight"] == pytest.approx((sigmoid(-0.5) + sigmoid(1.0) + 0.5) / 3)
    assert values["logps/chosen"] == pytest.approx(-5 / 3)
    assert means.pop() == {}


def test_token_metrics_count_a_shared_token_once_for_each_response():
    # one pair, rows 0 and 1 shared by both sides, row 2 chosen only, rows 3 and 4 rejected only
    tokens = TokenLogps(
        logps=torch.zeros(5),
        entropy=torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]),
        mean_logits=torch.tensor([10.0, 20.0, 30.0, 40.0, 50.0]),
        is_top1=torch.tensor([True, False, True, True, True]),
    )
    sums = torch.zeros(2)
    logps = PairLogps(sums[:1], sums[1:], None, None, SequenceLogps(sums, torch.tensor([3, 4]), tokens))
    means = MetricMeans()
    means.add(
        token_metrics(logps, torch.tensor([0, 1, 2, 0, 1, 3, 4]), torch.tensor([0, 3, 7]), pairs=torch.tensor([[0, 1]]))
    )
    values = means.pop()
    assert values["entropy"] == pytest.approx((1 + 2 + 3 + 1 + 2 + 4 + 5) / 7)
    assert values["logits/chosen"] == pytest.approx(20)
    assert values["logits/rejected"] == pytest.approx(30)
    assert values["mean_token_accuracy"] == pytest.approx(2 / 3)


def test_means_over_processes_add_sums_and_weights_before_dividing():
    means = MetricMeans()
    means.add({"x": (torch.tensor(6.0), 2)})
    other_process = torch.tensor([[1.0, 5.0]])
    assert means.pop(lambda table: table + other_process)["x"] == pytest.approx(7 / 7)
