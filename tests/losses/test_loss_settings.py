"""What losses cannot be computed with, or together, is refused by the config."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
from tiny_runs import losses, tiny_trainer

from fastdpo import LOSSES, DPOConfig
from fastdpo.losses import DIVERGENCES, loss
from fastdpo.losses.table import losses_table


def config(tmp_path, **settings):
    return DPOConfig(str(tmp_path), use_cpu=True, **settings)


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("ipo", ["ipo"]),
        (["ipo"], ["ipo"]),
        ("sigmoid,sft", ["sigmoid", "sft"]),
        (["sigmoid, sft"], ["sigmoid", "sft"]),
        (["sigmoid", "bco_pair", "sft"], ["sigmoid", "bco_pair", "sft"]),
    ],
)
def test_loss_types_are_a_name_a_list_or_text_with_commas(tmp_path, given, names):
    assert config(tmp_path, loss_type=given).loss_type == names


def test_the_default_is_one_sigmoid_loss(tmp_path):
    assert config(tmp_path).loss_type == ["sigmoid"]
    assert config(tmp_path).loss_weights is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": []}, "loss_type must name at least one loss"),
        ({"loss_type": 3}, "loss_type must be a name or a list of names, got 3"),
        ({"loss_type": ["sigmoid", "stf"]}, "got 'stf'; did you mean 'sft'"),
        ({"loss_weights": [1.0, 2.0]}, r"loss_weights must have one value for each of the 1 losses, got \[1.0, 2.0\]"),
        ({"loss_weights": 1.0}, "loss_weights must have one value for each of the 1 losses, got 1.0"),
        ({"loss_weights": [-1.0]}, r"loss_weights must be finite numbers >= 0, got \[-1.0\]"),
        ({"discopop_tau": 0.0}, "discopop_tau must be > 0 and finite, got 0.0"),
        ({"loss_type": ["hinge", "ipo"], "label_smoothing": 0.1}, r"label_smoothing must be 0 for .*'hinge', 'ipo'"),
        ({"loss_type": ["exo_pair", "sft"]}, "label_smoothing must be > 0 for loss_type 'exo_pair'"),
        ({"f_divergence_type": "reverse"}, "f_divergence_type must be one of .* did you mean 'reverse_kl'"),
        ({"f_alpha_divergence_coef": None}, "f_alpha_divergence_coef must be a finite number, got None"),
        (
            {"loss_type": ["sigmoid", "nca_pair"], "f_divergence_type": "forward_kl"},
            "f_divergence_type must be 'reverse_kl' for loss_type 'nca_pair'",
        ),
        (
            {"f_divergence_type": "forward_kl", "reference_free": True},
            "f_divergence_type must be 'reverse_kl' without a reference",
        ),
        (
            {"f_divergence_type": "forward_kl", "reference": "none"},
            "f_divergence_type must be 'reverse_kl' without a reference",
        ),
        ({"ld_alpha": 1.5}, r"ld_alpha must be None or in \[0, 1\], got 1.5"),
        ({"ld_alpha": 0.5, "loss_type": "orpo"}, "ld_alpha must be None for loss_type 'orpo'"),
        ({"ld_alpha": 0.5, "loss_type": "plackett_luce"}, "ld_alpha must be None for loss_type 'plackett_luce'"),
        ({"use_weighting": True, "loss_type": ["sigmoid", "aot"]}, "use_weighting must be False for loss_type 'aot'"),
        ({"use_weighting": True, "loss_type": "cpo"}, "use_weighting must be False for loss_type 'cpo'"),
        (
            {"loss_type": "sft", "f_divergence_type": "forward_kl"},
            "f_divergence_type must be 'reverse_kl' .* 'sft' alone",
        ),
        (
            {"loss_type": "sft", "use_weighting": True},
            "use_weighting must be False for loss_type 'sft' alone.* got True",
        ),
        ({"loss_type": "sft", "ld_alpha": 0.5}, "ld_alpha must be None for loss_type 'sft' alone.* got 0.5"),
        ({"loss_type": "simpo", "gamma_beta_ratio": -1.0}, "gamma_beta_ratio must be a finite number >= 0, got -1.0"),
        ({"loss_type": "cpo", "cpo_alpha": "1"}, "cpo_alpha must be a finite number >= 0, got '1'"),
        ({"loss_type": ["sigmoid", "simpo"]}, "must not hold both 'simpo' and 'sigmoid'"),
        ({"loss_type": ["orpo", "simpo"]}, "must not hold both 'orpo' and 'simpo'"),
        ({"loss_type": ["plackett_luce", "sft"]}, "'plackett_luce' must be the only loss"),
        ({"loss_type": "simpo", "reference": "frozen"}, "reference must be 'auto' or 'none' for loss_type 'simpo'"),
        ({"loss_type": "orpo", "precompute_ref_log_probs": True}, "precompute_ref_log_probs must be off for .*'orpo'"),
        ({"loss_type": "aot", "max_tokens_per_microbatch": 100}, "max_tokens_per_microbatch must be None .* be split"),
    ],
)
def test_losses_that_cannot_be_combined_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **settings)


def test_losses_without_a_reference_have_none(tmp_path):
    for name in ("simpo", "orpo", "cpo"):
        assert config(tmp_path, loss_type=[name, "sft"]).reference == "none"


def test_smoothing_reaches_those_losses_of_a_list_that_have_it(tmp_path):
    assert config(tmp_path, loss_type=["robust", "sft"], label_smoothing=0.1).label_smoothing == 0.1


PAGE = (Path(__file__).parents[2] / "docs" / "losses.md").read_text()


def test_the_page_holds_the_table_that_the_losses_make():
    assert losses_table() in PAGE, "run `python -m fastdpo.losses.table` and put what it prints into docs/losses.md"
    assert set(DIVERGENCES) <= set(re.findall(r"`([a-z_]+)`", PAGE))


def test_every_loss_names_its_source_and_settings_that_exist():
    known = {field.name for field in fields(DPOConfig)}
    for name, registered in LOSSES.items():
        assert "arXiv" in registered.function.__doc__, name
        assert set(registered.settings) <= known


def test_a_loss_is_registered_by_writing_it(tmp_path):
    """One function: the config takes its name, the trainer trains with it, help and table show it."""
    before = dict(LOSSES)

    @loss(smoothed=True)
    def squared(scores, config):
        """`(beta (c - r) - 1)^2`. A loss of this test, arXiv 0000.00000."""
        return (config.beta * scores.margins - 1) ** 2

    try:
        assert config(tmp_path, loss_type="squared", label_smoothing=0.1).loss_type == ["squared"]
        assert "| `squared` | `(beta (c - r) - 1)^2`. A loss of this test" in losses_table()
        trainer = tiny_trainer(tmp_path, loss_type="squared", max_steps=1)
        assert losses(trainer) == [pytest.approx(1.0, abs=1e-5)]
    finally:
        LOSSES.clear()
        LOSSES.update(before)


def test_a_fact_that_no_loss_has_is_refused_where_it_is_written():
    with pytest.raises(TypeError, match="smoothd"):
        loss(smoothd=True)(lambda scores, config: None)
    with pytest.raises(AssertionError, match="unit must be one of"):
        loss(unit="pears")(lambda scores, config: None)


def test_simpo_takes_the_margin_under_the_name_of_trls_cpo_trainer(tmp_path):
    """There it is gamma, here gamma / beta."""
    with pytest.warns(FutureWarning, match="gamma_beta_ratio"):
        translated = config(tmp_path, loss_type="simpo", beta=2.0, simpo_gamma=0.5)
    assert translated.gamma_beta_ratio == 0.25
