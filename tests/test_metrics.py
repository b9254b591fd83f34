"""Metrics weigh every pair and every token alike, however the batches were cut."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

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


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_token_metrics_count_a_shared_token_once_for_each_response(impl):
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
    rows, cu_seqlens, pairs = torch.tensor([0, 1, 2, 0, 1, 3, 4]), torch.tensor([0, 3, 7]), torch.tensor([[0, 1]])
    means.add(token_metrics(logps, rows, cu_seqlens, pairs=pairs, impl=impl))
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


def test_weights_of_the_host_and_of_the_device_add_up_whatever_keys_a_batch_has():
    means = MetricMeans()
    means.add({"a": (torch.tensor(6.0), 2.0), "b": (torch.tensor(3.0), torch.tensor(4))})
    means.add({"b": (torch.tensor(1.0), 4.0), "a": (torch.tensor(2), torch.tensor(2.0, dtype=torch.float64))})
    means.add({"c": (torch.tensor(5.0), 0.0), "a": (torch.tensor(1.0), 1.0)})
    assert means.peek() == means.pop() == {"a": 9 / 5, "b": 4 / 8}
    means.add({})
    assert means.pop() == {}


def test_what_a_micro_batch_adds_takes_few_launches():
    """Each operation that is no view is a launch on a GPU; one by one these metrics took about a hundred."""

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if not (func.is_view or func.name() in ("aten::detach", "aten::lift_fresh")):
                seen.append(func.name())
            return result

    tokens = TokenLogps(*torch.rand(4, 7).unbind(), is_top1=torch.rand(7) < 0.5)
    sums, lengths = torch.zeros(2), torch.tensor([3, 4])
    logps = PairLogps(sums[:1], sums[1:], None, None, SequenceLogps(sums, lengths, tokens))
    pairs, rows, cu_seqlens = torch.tensor([[0, 1]]), torch.arange(7), torch.tensor([0, 3, 7])
    with_lengths = PairScores(*torch.rand(4, 1).unbind(), *lengths.split(1))
    means, seen = MetricMeans(), []
    for _ in range(2):
        del seen[:]
        with Counted():
            metrics = pair_metrics(with_lengths, beta=0.1)
            metrics.update(token_metrics(logps, rows, cu_seqlens, pairs, impl="triton"))
            means.add(metrics)
    assert len(metrics) == 13
    assert seen.count("fastdpo::token_sums") == 1
    assert len(seen) <= 26, seen
