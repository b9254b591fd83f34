"""simpo, cpo and orpo against the trainers that TRL has for them, function by function."""

from types import SimpleNamespace

import pytest
import torch
from peers import peer

from fastdpo import LOSSES, PairScores

trl = peer("trl")

LENGTHS = torch.tensor([[3, 2], [5, 4], [1, 6]])
SUMS = torch.tensor([[-4.0, -6.0], [-9.0, -3.5], [-0.01, -20.0]])


def ours(name, **settings):
    scores = PairScores(*SUMS.unbind(1), *torch.zeros(2, 3), *LENGTHS.unbind(1))
    config = SimpleNamespace(**{"label_smoothing": 0.0, "cpo_alpha": 1.0, "gamma_beta_ratio": 0.25, **settings})
    return LOSSES[name](scores, config)


def nll():
    """The mean over the tokens of the chosen responses."""
    return -SUMS[:, 0].sum() / LENGTHS[:, 0].sum()


def of_trl(function, logps, **settings):
    accelerator = SimpleNamespace(device=torch.device("cpu"))
    return function(SimpleNamespace(accelerator=accelerator, **settings), *logps.unbind(1))[0]


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_simpo_is_that_of_trls_cpo_trainer(label_smoothing):
    """Its simpo_gamma is gamma, ours gamma / beta."""
    from trl.experimental.cpo import CPOTrainer

    settings = {"beta": 2.0, "label_smoothing": label_smoothing}
    theirs = of_trl(CPOTrainer.cpo_loss, SUMS / LENGTHS, loss_type="simpo", simpo_gamma=0.6, alpha=0.0, **settings)
    torch.testing.assert_close(ours("simpo", gamma_beta_ratio=0.3, **settings), theirs)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_cpo_is_that_of_trls_cpo_trainer(label_smoothing):
    from trl.experimental.cpo import CPOTrainer

    settings = {"beta": 0.1, "label_smoothing": label_smoothing}
    theirs = of_trl(CPOTrainer.cpo_loss, SUMS, loss_type="sigmoid", alpha=0.0, **settings).mean() + 0.5 * nll()
    torch.testing.assert_close(ours("cpo", cpo_alpha=0.5, **settings).mean(), theirs)


def test_orpo_is_that_of_trls_orpo_trainer():
    """But for its likelihood term, which counts the tokens of the prompt too."""
    from trl.experimental.orpo import ORPOTrainer

    theirs = nll() - of_trl(ORPOTrainer.odds_ratio_loss, SUMS / LENGTHS, beta=0.2).mean()
    torch.testing.assert_close(ours("orpo", beta=0.2).mean(), theirs)
