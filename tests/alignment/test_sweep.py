"""The sweep's figures agree with what the trainer reports, and the start stays as it is."""

import copy
import math

import pytest
import torch
from tiny import make_llama, make_rows, make_tokenizer

from fastdpo.alignment.sweep import Measurement, pair_logps, sweep_beta
from fastdpo.data.prepare import prepare_preference_dataset
from fastdpo.data.tokens.tokenization import TokenizationSettings
from fastdpo.training import DPOConfig

HELDOUT = make_rows(13, seed=1)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A sweep over two betas, with the start before and after and the models it handed out."""
    tokenizer = make_tokenizer()
    model = make_llama(len(tokenizer))
    before = copy.deepcopy(model.state_dict())
    policies = {}
    args = DPOConfig(
        str(tmp_path_factory.mktemp("sweep")),
        per_device_train_batch_size=4,
        learning_rate=5e-3,
        max_steps=8,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=8,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    result = sweep_beta(
        model,
        tokenizer,
        [0.5, 0.1],
        args=args,
        train_rows=make_rows(20),
        heldout_rows=HELDOUT,
        measurement=Measurement(
            [row["prompt"] for row in HELDOUT], lambda _, response: response.count("cat"), max_new_tokens=8
        ),
        on_policy=lambda policy, r: policies.update({r.beta: policy}),
    )
    return result, model, before, policies, tokenizer, args


def test_betas_are_trained_in_rising_order_from_one_unchanged_start(swept):
    result, model, before, policies, _, args = swept
    assert [policy.beta for policy in result.policies] == [0.1, 0.5] == list(policies)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for policy in result.policies:
        assert policy.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert not torch.equal(policies[0.1].lm_head.weight, policies[0.5].lm_head.weight)
    assert args.beta == DPOConfig(args.output_dir).beta


def test_accuracy_and_margin_are_the_trainers_own_on_the_heldout_rows(swept):
    for policy in swept[0].policies:
        evaluated = next(entry for entry in reversed(policy.log_history) if "eval_loss" in entry)
        assert policy.accuracy.mean == pytest.approx(evaluated["eval_rewards/accuracies"], abs=1e-6)
        assert policy.margin.mean == pytest.approx(evaluated["eval_rewards/margins"], abs=1e-4)


def test_the_reference_has_no_margin_and_no_kl_and_ranks_by_its_log_probs(swept):
    result, model, _, _, tokenizer, _ = swept
    assert result.reference.name == "Reference"
    assert (result.reference.margin.mean, result.reference.kl.mean) == (0, 0)
    heldout, _ = prepare_preference_dataset(HELDOUT, tokenizer, TokenizationSettings())
    chosen, rejected = pair_logps(model, heldout, batch_size=5)
    assert result.reference.accuracy.mean == pytest.approx((chosen > rejected).double().mean().item())


def test_rewards_are_of_the_samples_and_models_draw_independently(swept):
    models = swept[0].models
    for model in models:
        assert model.rewards == tuple(text.count("cat") for text in model.samples.responses)
        assert model.samples.prompts == tuple(row["prompt"] for row in HELDOUT)
    assert len({model.samples.responses for model in models}) == 3


def test_the_orderings_name_every_beta(swept):
    claims = [ordering.claim for ordering in swept[0].orderings()]
    assert claims == [
        "DPO, beta = 0.1: accuracy above the reference",
        "DPO, beta = 0.1: reward above the reference",
        "DPO, beta = 0.5: accuracy above the reference",
        "DPO, beta = 0.5: reward above the reference",
        "KL at beta = 0.1 above beta = 0.5",
    ]


@pytest.mark.parametrize("betas", [[], [0.1, 0.0], [0.1, 0.1], [-1.0]])
def test_betas_that_are_not_positive_or_repeat_are_refused(betas, llama, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"betas must .*got"):
        sweep_beta(
            llama,
            tokenizer,
            betas,
            args=DPOConfig(str(tmp_path)),
            train_rows=[],
            heldout_rows=[],
            measurement=Measurement([], lambda prompt, response: 0.0),
        )
