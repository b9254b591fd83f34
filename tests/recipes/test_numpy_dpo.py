"""The recipe in NumPy: its gradient, its agreement with fastdpo and autograd, and what its training finds."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from fastdpo import preference_loss
from recipes import numpy_dpo
from recipes.numpy_dpo import BETA, LENGTH, PROMPTS, TOKENS, contexts, dpo, logps, main

NUM_PAIRS = 40


@pytest.fixture
def case():
    """(table, reference, x, chosen, rejected), some pairs of equal beginnings among them."""
    rng = np.random.default_rng(3)
    table, reference = rng.normal(size=(2, PROMPTS, (TOKENS + 1) ** (LENGTH - 1), TOKENS))
    x = rng.integers(PROMPTS, size=NUM_PAIRS)
    chosen, rejected = rng.integers(TOKENS, size=(2, NUM_PAIRS, LENGTH))
    return table, reference, x, chosen, rejected


def test_it_has_less_than_80_lines():
    assert len(Path(numpy_dpo.__file__).read_text().splitlines()) < 80


def test_every_prefix_has_a_row_of_its_own():
    y = numpy_dpo.RESPONSES
    rows = {(t, tuple(row[:t])): int(contexts(y)[i, t]) for i, row in enumerate(y) for t in range(LENGTH)}
    assert len(rows) == 1 + 3 + 9 == len(set(rows.values()))
    assert max(rows.values()) < (TOKENS + 1) ** (LENGTH - 1)


def test_probabilities_of_all_responses_to_a_prompt_sum_to_one(case):
    table = case[0]
    for prompt in range(PROMPTS):
        logp = logps(table, np.full(27, prompt), numpy_dpo.RESPONSES)
        assert np.exp(logp).sum() == pytest.approx(1, abs=1e-12)


def test_the_gradient_is_that_of_finite_differences(case):
    table, *rest = case
    _, grad = dpo(table, *rest)
    step = 1e-5
    for index in np.ndindex(table.shape):
        nudge = np.zeros_like(table)
        nudge[index] = step
        by_differences = (dpo(table + nudge, *rest)[0] - dpo(table - nudge, *rest)[0]) / (2 * step)
        assert grad[index] == pytest.approx(by_differences, abs=1e-9), index


def test_loss_and_gradient_are_those_of_fastdpo_and_autograd(case):
    table, reference, x, chosen, rejected = case
    logits = torch.tensor(table, requires_grad=True)

    def of(logits, y):
        picked = logits.log_softmax(-1)[torch.tensor(x)[:, None], torch.tensor(contexts(y)), torch.tensor(y)]
        return picked.sum(1)

    ref = [of(torch.tensor(reference), y) for y in (chosen, rejected)]
    losses, _, _ = preference_loss(of(logits, chosen), of(logits, rejected), *ref, beta=BETA)
    losses.mean().backward()
    loss, grad = dpo(table, reference, x, chosen, rejected)
    assert loss == pytest.approx(losses.mean().item(), rel=1e-9)
    torch.testing.assert_close(torch.tensor(grad), logits.grad, rtol=1e-9, atol=1e-12)


def test_training_comes_close_to_the_optimum_of_theory(capsys):
    main(num_pairs=8000)
    printed = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", printed)]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-4)
    assert losses == sorted(losses, reverse=True)
    for by_hand, by_differences in re.findall(r"gradient ([-+\d.]+)  by differences ([-+\d.]+)", printed):
        assert float(by_hand) == pytest.approx(float(by_differences), abs=2e-8)
    figures = re.findall(r"true reward ([\d.]+)  KL to the reference ([\d.]+)", printed)
    (start, no_kl), (reward, kl), (best, best_kl) = [tuple(map(float, of)) for of in figures]
    assert no_kl == 0
    assert start + 0.9 * (best - start) < reward
    assert kl == pytest.approx(best_kl, rel=0.15)
