"""Losses beyond one pair and a reference, and what changes their scores, against numbers worked out by hand."""

import math
from types import SimpleNamespace

import pytest
import torch

from fastdpo import LOSSES, PairScores
from fastdpo.losses import DIVERGENCES, losses_where, pair_scores, preference_losses
from fastdpo.losses.scores import relative_likelihoods


def settings(**changed):
    defaults = {
        "loss_type": ["sigmoid"],
        "loss_weights": None,
        "beta": 2.0,
        "label_smoothing": 0.0,
        "discopop_tau": 0.05,
        "gamma_beta_ratio": 0.25,
        "cpo_alpha": 0.5,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "ld_alpha": None,
        "use_weighting": False,
    }
    return SimpleNamespace(**{**defaults, **changed})


def scores_of(*rows, lengths=None, **fields):
    """From rows of policy chosen and rejected, reference chosen and rejected; lengths alike."""
    columns = torch.tensor(rows, dtype=torch.float64).unbind(1)
    lengths = [] if lengths is None else torch.tensor(lengths).unbind(1)
    return PairScores(*columns, *lengths, **fields)


def softplus(x):  # -log s(-x)
    return math.log(1 + math.exp(x))


# policy: chosen -1, rejected -2; reference: chosen -1.5, rejected -1.8; log-ratios 0.5 and -0.2
ONE = scores_of((-1.0, -2.0, -1.5, -1.8), lengths=[(2, 4)])
# two tokens of probability 1/2, whose odds are 1, against four of 1/4, whose odds are 1/3
HALVES = scores_of((-2 * math.log(2), -4 * math.log(4), 0.0, 0.0), lengths=[(2, 4)])
# log-ratios 0.5 and 1.0 of the chosen, -0.2 and 2.0 of the rejected; margins 1 and -3 of the policy, 0.3 and -2 of the
# reference
TWO = scores_of((-1.0, -2.0, -1.5, -1.8), (-4.0, -1.0, -5.0, -3.0))


@pytest.mark.parametrize(
    ("name", "scores", "config", "by_hand"),
    [
        ("sigmoid_norm", ONE, settings(), [softplus(-2 * (0.5 / 2 + 0.2 / 4))]),
        ("sft", ONE, settings(), [1 / 2]),
        ("simpo", ONE, settings(), [softplus(-2 * (-0.5 + 0.5 - 0.25))]),
        ("simpo", ONE, settings(label_smoothing=0.1), [0.9 * softplus(0.5) + 0.1 * softplus(-0.5)]),
        ("orpo", HALVES, settings(beta=0.1), [math.log(2) + 0.1 * math.log(4 / 3)]),
        ("cpo", ONE, settings(), [softplus(-2.0) + 0.5 * 0.5]),
        ("cpo", ONE, settings(label_smoothing=0.1), [0.9 * softplus(-2.0) + 0.1 * softplus(2.0) + 0.5 * 0.5]),
        ("aot", TWO, settings(), [softplus(-2 * (-3 + 2)), softplus(-2 * (1 - 0.3))]),
        ("aot_unpaired", TWO, settings(), [softplus(-2 * (0.5 + 0.2)), softplus(-2 * (1.0 - 2.0))]),
        (
            "aot_unpaired",
            TWO,
            settings(label_smoothing=0.1),
            [0.9 * softplus(-1.4) + 0.1 * softplus(1.4), 0.9 * softplus(2.0) + 0.1 * softplus(-2.0)],
        ),
    ],
)
def test_each_loss_has_the_value_worked_out_by_hand(name, scores, config, by_hand):
    assert LOSSES[name](scores, config).tolist() == pytest.approx(by_hand, rel=1e-9)


def test_the_mean_of_sft_over_pairs_is_the_mean_over_tokens_however_the_pairs_are_split():
    """Chosen responses of 2 and 6 tokens with log-probs -1 and -9: 10 nats over 8 tokens."""
    rows = [(-1.0, 0.0, 0.0, 0.0), (-9.0, 0.0, 0.0, 0.0)]
    whole = LOSSES["sft"](scores_of(*rows, lengths=[(2, 1), (6, 1)]), settings())
    assert whole.mean().item() == pytest.approx(10 / 8)
    mean_length = torch.tensor(4.0)
    parts = [
        LOSSES["sft"](scores_of(row, lengths=[(n, 1)], mean_chosen_length=mean_length), settings())
        for row, n in zip(rows, (2, 6), strict=True)
    ]
    assert torch.cat(parts).tolist() == pytest.approx(whole.tolist())


@pytest.mark.parametrize("name", losses_where(lambda loss: loss.likelihood))
def test_the_likelihood_term_counts_every_token_whole_under_ld_alpha(name):
    weighed = scores_of((-1.0, -2.0, 0.0, 0.0), lengths=[(2, 4)], chosen_sums=torch.tensor([-5.0]))
    as_it_is = scores_of((-1.0, -2.0, 0.0, 0.0), lengths=[(2, 4)])
    factor = {"cpo": 0.5}.get(name, 1.0)
    difference = LOSSES[name](weighed, settings()) - LOSSES[name](as_it_is, settings())
    assert difference.item() == pytest.approx(factor * (5.0 - 1.0) / 2)


def test_orpo_stays_finite_for_responses_that_are_certain_or_hopeless():
    for chosen, rejected in [(0.0, -1.0), (-1.0, 0.0), (0.0, 0.0), (-1e-9, -3e3), (-3e3, -3e3)]:
        logps = torch.tensor([chosen, rejected, 0.0, 0.0], requires_grad=True)
        lengths = torch.tensor([3])
        loss = LOSSES["orpo"](PairScores(*logps[:, None], lengths, lengths), settings(beta=0.1))
        loss.sum().backward()
        assert loss.isfinite().all()
        assert logps.grad.isfinite().all()


def test_orpo_keeps_the_digits_of_odds_near_certainty_in_fp32():
    """Chosen at odds of 1; rejected at a log-prob of -1e-6, whose odds are 1 / (exp(1e-6) - 1), about a million."""
    logps = torch.tensor([-math.log(2), -1e-6, 0.0, 0.0])
    ones = torch.tensor([1])
    loss = LOSSES["orpo"](PairScores(*logps[:, None], ones, ones), settings(beta=1.0))
    assert loss.item() == pytest.approx(math.log(2) + softplus(6 * math.log(10)), rel=1e-6)


# Rankings


def test_a_ranking_has_the_likelihood_of_drawing_its_responses_in_order():
    """Weights 6, 3 and 1: the first is drawn with probability 6/10, the second of the two left with 3/4."""
    logs = [math.log(6), math.log(3), 0.0]
    scores = scores_of((logs[0], logs[1], 0.0, 0.0), (logs[1], logs[2], 0.0, 0.0), rankings=torch.tensor([0, 0]))
    losses = LOSSES["plackett_luce"](scores, settings(beta=1.0))
    assert losses.tolist() == pytest.approx([-math.log(6 / 10), -math.log(3 / 4)], rel=1e-9)


def test_rankings_do_not_see_each_other():
    """A ranking of three beside one of two, with rewards twice the log-ratios."""
    rows = [(0.5, 0.1, 0.0, 0.0), (0.1, -0.4, 0.0, 0.0), (1.0, 2.0, 0.0, 0.0)]
    together = LOSSES["plackett_luce"](scores_of(*rows, rankings=torch.tensor([0, 0, 1])), settings())
    a, b, c = math.exp(1.0), math.exp(0.2), math.exp(-0.8)
    assert together.tolist() == pytest.approx([-math.log(a / (a + b + c)), -math.log(b / (b + c)), softplus(2.0)])


def test_plackett_luce_of_two_responses_is_sigmoid():
    scores = scores_of((-1.0, -2.0, -1.5, -1.8), (-4.0, -1.0, -5.0, -3.0))
    values = [LOSSES[name](scores, settings()) for name in ("plackett_luce", "sigmoid")]
    torch.testing.assert_close(*values)


# f-divergences


def at(ratio, **changed):
    return settings(**changed), torch.tensor([math.log(ratio)], dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "ratio", "coefficient", "by_hand"),
    [
        ("reverse_kl", 4, 0.5, math.log(4)),
        ("forward_kl", 4, 0.5, 1 - 1 / 4),
        ("js_divergence", 2, 0.5, math.log(4 / 3)),  # log(2u / (u + 1))
        ("alpha_divergence", 4, 0.5, (1 / 2 - 1) / (-1 / 2)),  # (u^(a - 1) - 1) / (a - 1)
        ("alpha_divergence", 4, 3.0, (16 - 1) / 2),
        ("alpha_divergence", 4, 1.0, math.log(4)),
    ],
)
def test_each_divergence_has_the_derivative_worked_out_by_hand(name, ratio, coefficient, by_hand):
    config, logratio = at(ratio, f_alpha_divergence_coef=coefficient)
    assert DIVERGENCES[name](logratio, config).item() == pytest.approx(by_hand, rel=1e-12)
    assert DIVERGENCES[name](torch.zeros(1, dtype=torch.float64), config).item() == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_ratio_far_from_one_gives_a_finite_loss_and_gradient(name):
    logps = torch.tensor([-3e2, 3e2, 0.0, 0.0], requires_grad=True)
    loss = preference_losses(PairScores(*logps[:, None]), settings(f_divergence_type=name, beta=0.1))
    loss.sum().backward()
    assert loss.isfinite().all()
    assert logps.grad.isfinite().all()


def test_a_run_under_a_divergence_compares_derivatives_and_leaves_sft_alone():
    """Ratios 4 and 2 under the forward KL: 3/4 - 1/2 = 1/4, times beta = 2."""
    scores = scores_of((math.log(4) - 3, math.log(2) - 3, -3.0, -3.0), lengths=[(1, 1)])
    config = settings(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 10.0], f_divergence_type="forward_kl")
    expected = softplus(-0.5) + 10 * (3 - math.log(4))
    assert preference_losses(scores, config).item() == pytest.approx(expected, rel=1e-9)


# Several losses, weights of pairs, weights of tokens


def test_several_losses_are_added_with_their_weights():
    config = settings(loss_type=["sigmoid", "hinge", "sft"], loss_weights=[0.5, 2.0, 3.0], beta=0.5)
    by_hand = 0.5 * softplus(-0.35) + 2 * (1 - 0.35) + 3 * 0.5
    assert preference_losses(ONE, config).item() == pytest.approx(by_hand, rel=1e-9)
    config.loss_weights = None
    assert preference_losses(ONE, config).item() == pytest.approx(softplus(-0.35) + 0.65 + 0.5, rel=1e-9)


def test_a_response_is_as_typical_as_its_probabilities_beside_those_of_samples():
    """Two tokens of 1/2 and 1/4 where samples have 1/2 and 1/4 on average: 1. Twice as likely per token: 2."""
    sums = torch.tensor([math.log(1 / 8), math.log(1 / 2)], requires_grad=True)
    squares = torch.tensor([math.log(1 / 8), math.log(1 / 8)])
    typical = relative_likelihoods(sums, squares, torch.tensor([2, 2]))
    assert typical.tolist() == pytest.approx([1.0, 2.0])
    assert not typical.requires_grad


def test_pairs_are_weighed_by_both_responses_and_sft_is_not():
    """Weights 1 and 2 * 3 = 6."""
    sums = torch.tensor([-1.0, -1.0, -2.0, -2.0])
    squares = sums - torch.tensor([0.0, 0.0, math.log(2), math.log(3)])
    pairs, ones = torch.tensor([[0, 1], [2, 3]]), torch.ones(4, dtype=torch.int64)
    config = settings(use_weighting=True, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 10.0])
    scores = pair_scores(pairs, sums, ones, torch.zeros(4), config, log_sum_sq_probs=squares)
    by_hand = [math.log(2) + 10 * 1, 6 * math.log(2) + 10 * 2]
    assert preference_losses(scores, config).tolist() == pytest.approx(by_hand, rel=1e-5)


def test_tokens_beyond_the_shared_length_weigh_ld_alpha_in_policy_and_reference():
    """Chosen -5, of which -2 within the shared length: -2 - 3 / 4. All else is within it."""
    sums, ref_sums = torch.tensor([-5.0, -1.0, -2.0, -1.0]), torch.tensor([-9.0, -3.0, -1.0, -3.0])
    lengths = torch.tensor([4, 2, 2, 2])
    pairs, shared_parts = torch.tensor([[0, 1]]), torch.tensor([[2, 3]])
    scores = pair_scores(pairs, sums, lengths, ref_sums, settings(ld_alpha=0.25), shared_parts=shared_parts)
    assert scores.policy_chosen_logps.tolist() == [-2.75]
    assert scores.policy_rejected_logps.tolist() == [-1.0]
    assert scores.ref_chosen_logps.tolist() == [-3.0]
    assert scores.ref_rejected_logps.tolist() == [-3.0]
    assert scores.chosen_sums.tolist() == [-5.0]
    assert scores.chosen_lengths.tolist() == [4]
