"""The KL estimator on a tabular policy, whose KL to the reference is a finite sum."""

import math
from dataclasses import replace
from statistics import fmean, stdev

import pytest
import torch
from tabular import EOS, Tabular, all_responses, exact_kl, make_tabular_tokenizer

from fastdpo.alignment.generate import Samples, kl_to_reference, sample_responses
from fastdpo.rounds.generate import Sampling
from fastdpo.rounds.measure import measure

PROMPTS = ["yes", "no perhaps", "perhaps perhaps"]  # of two lengths: generation pads, and the KLs differ


@pytest.fixture(scope="module")
def pair():
    """Policy and reference. Histories have at most BOS, two words and three tokens of the response."""
    return Tabular(0, longest=6), Tabular(1, longest=6)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tabular_tokenizer()


@pytest.fixture(scope="module")
def exact(pair, tokenizer):
    """{max_new_tokens: KL of each prompt}."""
    ids = tokenizer(PROMPTS)["input_ids"]
    return {limit: [exact_kl(*pair, prompt, limit) for prompt in ids] for limit in (1, 2, 3)}


@pytest.mark.parametrize("max_new_tokens", [1, 2, 3])
def test_the_expectation_of_the_estimate_is_the_kl(pair, tokenizer, exact, max_new_tokens):
    """No sampling: the estimates of all responses, weighted by their probabilities under the policy."""
    for prompt, kl in zip(PROMPTS, exact[max_new_tokens], strict=True):
        prompt_ids = tokenizer(prompt)["input_ids"]
        responses, logps = zip(*all_responses(pair[0], prompt_ids, max_new_tokens), strict=True)
        probs = torch.tensor(logps, dtype=torch.float64).exp()
        assert probs.sum().item() == pytest.approx(1, abs=1e-6)
        n = len(responses)
        samples = Samples((prompt,) * n, ("",) * n, (prompt_ids,) * n, tuple(responses))
        estimates = kl_to_reference(*pair, samples, batch_size=100)
        assert kl > 0.2
        assert (probs * estimates).sum().item() == pytest.approx(kl, rel=1e-5)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("max_new_tokens", [1, 2, 3])
def test_the_mean_over_samples_is_the_kl_also_if_responses_are_cut(pair, tokenizer, exact, max_new_tokens, seed):
    samples = sample_responses(
        pair[0], tokenizer, PROMPTS, num_samples=400, max_new_tokens=max_new_tokens, batch_size=600, seed=seed
    )
    cut = fmean(ids[-1] != EOS for ids in samples.response_ids)
    assert 0.2 < cut < 0.95
    estimates = kl_to_reference(*pair, samples, batch_size=600).reshape(3, 400)
    for of_prompt, kl in zip(estimates, exact[max_new_tokens], strict=True):
        stderr = of_prompt.std().item() / math.sqrt(400)
        assert abs(of_prompt.mean().item() - kl) <= 4 * stderr + 1e-6


@pytest.fixture(scope="module")
def rounds(pair, tokenizer, tmp_path_factory):
    """The KL and its standard error as a round reports them, 150 times with 60 prompts each."""
    start_file = tmp_path_factory.mktemp("start") / "start.json"
    prompts, sampling = PROMPTS * 20, Sampling(2, max_new_tokens=3, batch_size=60)

    def length(prompts, completions):
        return [float(len(text)) for text in completions]

    measure(pair[1], tokenizer, length, prompts, sampling, None, start_file)
    found = [
        measure(pair[0], tokenizer, length, prompts, replace(sampling, seed=seed), pair[1], start_file)
        for seed in range(150)
    ]
    return [round["kl"] for round in found], [round["kl_stderr"] for round in found]


def test_the_kl_of_rounds_has_no_bias_over_many_draws(rounds, exact):
    kls, _ = rounds
    kl = fmean(exact[3])
    assert abs(fmean(kls) - kl) < 4 * stdev(kls) / math.sqrt(len(kls))
    assert stdev(kls) / math.sqrt(len(kls)) < 0.02 * kl  # a bias of a tenth would be seen


def test_the_standard_error_of_rounds_is_the_spread_of_its_draws(rounds):
    """The prompts are the same in every draw. So a standard error that includes their differences is a little wide."""
    kls, stderrs = rounds
    assert 0.85 < fmean(stderrs) / stdev(kls) < 1.6


def test_a_biased_estimate_would_be_seen(pair, tokenizer, exact):
    """Without the last token of responses that were cut, the KL is too small by far more than the bound."""
    samples = sample_responses(pair[0], tokenizer, PROMPTS[:1], num_samples=400, max_new_tokens=3, batch_size=400)
    shorter = tuple(ids[:-1] if len(ids) > 1 and ids[-1] != EOS else ids for ids in samples.response_ids)
    estimates = kl_to_reference(*pair, replace(samples, response_ids=shorter), batch_size=400)
    assert exact[3][0] - estimates.mean().item() > 4 * estimates.std().item() / math.sqrt(400)
