"""Losses of single pairs against arithmetic done by hand, and against the closed form that DPO is derived from."""

import math
from types import SimpleNamespace

import pytest
import torch

from fastdpo import LOSSES, PairScores

# policy: chosen -1, rejected -2; reference: chosen -1.5, rejected -1.8; margin = 0.5 - (-0.2) = 0.7
SCORES = PairScores(
    *(torch.tensor([x], dtype=torch.float64) for x in (-1.0, -2.0, -1.5, -1.8)),
    chosen_lengths=torch.tensor([2]),
    rejected_lengths=torch.tensor([4]),
)


def config(beta=2.0, label_smoothing=0.0, discopop_tau=0.05):
    others = {"gamma_beta_ratio": 0.25, "cpo_alpha": 1.0}
    return SimpleNamespace(beta=beta, label_smoothing=label_smoothing, discopop_tau=discopop_tau, **others)


def sig(x):
    return 1 / (1 + math.exp(-x))


def softplus(x):  # -log sigmoid(-x)
    return math.log(1 + math.exp(x))


@pytest.mark.parametrize(
    ("name", "settings", "by_hand"),
    [
        ("sigmoid", config(), math.log(1 + math.exp(-1.4))),
        (
            "sigmoid",
            config(label_smoothing=0.1),
            0.9 * math.log(1 + math.exp(-1.4)) + 0.1 * math.log(1 + math.exp(1.4)),
        ),
        ("hinge", config(beta=0.5), 1 - 0.35),
        ("hinge", config(beta=2.0), 0.0),
        ("ipo", config(beta=0.25), (0.5 / 2 - (-0.2) / 4 - 2.0) ** 2),
        # beta = 2: rewards 1.0 and -0.4, their difference 1.4
        (
            "exo_pair",
            config(label_smoothing=0.1),
            sig(1.4) * math.log(sig(1.4) / 0.9) + sig(-1.4) * math.log(sig(-1.4) / 0.1),
        ),
        ("nca_pair", config(), softplus(-1.0) + 0.5 * softplus(1.0) + 0.5 * softplus(-0.4)),
        ("robust", config(), softplus(-1.4)),
        ("robust", config(label_smoothing=0.1), (0.9 * softplus(-1.4) - 0.1 * softplus(1.4)) / 0.8),
        ("bco_pair", config(), softplus(-1.0) + softplus(-0.4)),
        ("sppo_hard", config(), 0.25**2 + 0.05**2),
        ("apo_zero", config(), 1 - sig(1.0) + sig(-0.4)),
        ("apo_down", config(), sig(1.0) + 1 - sig(1.4)),
        ("discopop", config(discopop_tau=0.5), softplus(-1.4) * (1 - sig(2.8)) + math.exp(-1.4) * sig(2.8)),
    ],
)
def test_each_loss_has_the_value_worked_out_by_hand(name, settings, by_hand):
    assert LOSSES[name](SCORES, settings).item() == pytest.approx(by_hand, rel=1e-12)


def test_the_robust_loss_undoes_flipped_labels_on_average():
    """Flip the labels of a pair with probability 0.1: the mean of the loss is the sigmoid loss of the true labels."""
    flipped = PairScores(
        SCORES.policy_rejected_logps, SCORES.policy_chosen_logps, SCORES.ref_rejected_logps, SCORES.ref_chosen_logps
    )
    robust = [LOSSES["robust"](scores, config(label_smoothing=0.1)).item() for scores in (SCORES, flipped)]
    assert 0.9 * robust[0] + 0.1 * robust[1] == pytest.approx(LOSSES["sigmoid"](SCORES, config()).item(), rel=1e-12)


def test_exo_is_zero_where_the_policy_prefers_as_the_labels_do():
    margin = math.log(0.9 / 0.1)
    scores = PairScores(*(torch.tensor([x], dtype=torch.float64) for x in (margin, 0.0, 0.0, 0.0)))
    assert LOSSES["exo_pair"](scores, config(beta=1.0, label_smoothing=0.1)).item() == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("logp", [-3e3, 3e3])
def test_a_hopeless_or_perfect_pair_gives_a_finite_loss_and_gradient(name, logp):
    logps = torch.tensor([logp, 0.0, 0.0, 0.0], requires_grad=True)
    scores = PairScores(*logps[:, None], chosen_lengths=torch.tensor([3]), rejected_lengths=torch.tensor([3]))
    loss = LOSSES[name](scores, config(beta=0.1, label_smoothing=0.1))
    loss.sum().backward()
    assert loss.isfinite().all()
    assert logps.grad.isfinite().all()


@pytest.mark.parametrize("name", ["ipo", "sigmoid_norm", "simpo", "sft", "orpo", "cpo"])
def test_means_over_tokens_without_lengths_are_refused(name):
    with pytest.raises(ValueError, match=r"PairScores must have chosen_lengths.*got None"):
        LOSSES[name](PairScores(*(torch.zeros(1) for _ in range(4))), config())


def test_the_sigmoid_loss_has_the_gradient_of_the_paper():
    logps = [torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (-1.0, -2.0)]
    scores = PairScores(*logps, SCORES.ref_chosen_logps, SCORES.ref_rejected_logps)
    LOSSES["sigmoid"](scores, config()).sum().backward()
    weight = 2.0 / (1 + math.exp(1.4))  # beta * sigmoid(-beta * margin)
    assert logps[0].grad.item() == pytest.approx(-weight, rel=1e-12)
    assert logps[1].grad.item() == pytest.approx(weight, rel=1e-12)


def test_a_tabular_policy_converges_to_the_closed_form():
    """DPO, eq. 4: the optimum is pi* = pi_ref exp(r / beta) / Z, and beta * logratio recovers reward differences (eq.
    5).

    3 prompts, 5 responses each, rewards in [-1, 1], 200,000 comparisons drawn by Bradley-Terry. A comparison's
    outcome has variance p(1 - p) >= 0.1 here, and each of the 10 pairs of a prompt is compared 200,000 / 30 times, so
    a reward difference is known to about 1 / sqrt(6,667 * 0.2) = 0.027 from one pair alone and better from all; 0.08
    is three times that.
    """
    torch.manual_seed(0)
    beta, num_comparisons = 0.5, 200_000
    rewards = torch.rand(3, 5, dtype=torch.float64) * 2 - 1
    ref_logps = torch.randn(3, 5, dtype=torch.float64).log_softmax(-1)
    prompts = torch.randint(3, (num_comparisons,))
    first = torch.randint(5, (num_comparisons,))
    second = (first + torch.randint(1, 5, (num_comparisons,))) % 5
    first_wins = torch.rand(num_comparisons) < torch.sigmoid(rewards[prompts, first] - rewards[prompts, second])
    chosen, rejected = torch.where(first_wins, first, second), torch.where(first_wins, second, first)
    counts = torch.zeros(3, 5, 5, dtype=torch.float64)
    counts.index_put_((prompts, chosen, rejected), torch.ones(num_comparisons, dtype=torch.float64), accumulate=True)

    logits = ref_logps.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")
    p, c, r = counts.nonzero(as_tuple=True)

    def closure():
        optimizer.zero_grad()
        policy = logits.log_softmax(-1)
        scores = PairScores(policy[p, c], policy[p, r], ref_logps[p, c], ref_logps[p, r])
        loss = (LOSSES["sigmoid"](scores, config(beta)) * counts[p, c, r]).sum() / num_comparisons
        loss.backward()
        return loss

    optimizer.step(closure)
    policy = logits.detach().log_softmax(-1)
    implicit = beta * (policy - ref_logps)
    differences = implicit[:, :, None] - implicit[:, None, :]
    true_differences = rewards[:, :, None] - rewards[:, None, :]
    assert (differences - true_differences).abs().max() < 0.08
    closed_form = (ref_logps + rewards / beta).softmax(-1)
    assert (policy.exp() - closed_form).abs().max() < 0.04
    assert (ref_logps.exp() - closed_form).abs().max() > 0.2  # the start was elsewhere
