"""Sampling follows the model's distribution, and the KL estimates agree with exact enumeration."""

import itertools
import math

import pytest
import torch
from tiny import make_llama

from fastdpo.alignment.generate import Samples, kl_to_reference, sample_responses

PROMPTS = ["the cat sees", "a dog", "the old bird eats the small red house", "big"]


def sharpened(model, factor):
    """Random weights give a flat softmax; larger head weights do not."""
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(factor)
    return model


def exact_kl(model, ref_model, prompt_ids, num_tokens, eos):
    """KL over all responses of at most `num_tokens` tokens, by enumeration."""
    total = 0.0
    vocab_size = model.config.vocab_size
    for length in range(1, num_tokens + 1):
        for response in itertools.product(range(vocab_size), repeat=length):
            ends = response[-1] == eos
            if eos in response[:-1] or (not ends and length < num_tokens):
                continue
            log_p, log_q = (sequence_logp(m, prompt_ids, response) for m in (model, ref_model))
            total += math.exp(log_p) * (log_p - log_q)
    return total


@torch.no_grad()
def sequence_logp(model, prompt_ids, response):
    input_ids = torch.tensor([[*prompt_ids, *response]])
    logps = model(input_ids=input_ids).logits[0].double().log_softmax(-1)
    return sum(logps[len(prompt_ids) - 1 + i, token].item() for i, token in enumerate(response))


def test_the_seed_decides_the_samples_and_the_global_random_state_is_untouched(llama, tokenizer):
    state = torch.random.get_rng_state()
    first = sample_responses(llama, tokenizer, PROMPTS, max_new_tokens=6, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(1)
    assert sample_responses(llama, tokenizer, PROMPTS, max_new_tokens=6, seed=1) == first
    assert sample_responses(llama, tokenizer, PROMPTS, max_new_tokens=6, seed=2) != first


def test_samples_of_a_prompt_are_neighbours_and_carry_the_prompt_as_the_tokenizer_encodes_it(llama, tokenizer):
    samples = sample_responses(llama, tokenizer, PROMPTS, num_samples=3, max_new_tokens=4, batch_size=5)
    assert samples.prompts == tuple(p for p in PROMPTS for _ in range(3))
    assert len(samples) == 12
    assert samples.prompt_ids[3] == tokenizer(PROMPTS[1])["input_ids"]
    assert samples.prompt_ids[3][0] == tokenizer.bos_token_id


@torch.no_grad()
def test_padding_on_the_left_does_not_change_what_a_prompt_is_answered(tokenizer):
    model = sharpened(make_llama(len(tokenizer)), 100)
    cold = sample_responses(model, tokenizer, PROMPTS, max_new_tokens=8, temperature=1e-3)
    for prompt_ids, response_ids in zip(cold.prompt_ids, cold.response_ids, strict=True):
        greedy = list(prompt_ids)
        for _ in response_ids:
            greedy.append(model(input_ids=torch.tensor([greedy])).logits[0, -1].argmax().item())
        assert response_ids == greedy[len(prompt_ids) :]


def test_every_token_is_drawn_as_often_as_the_model_says(tokenizer):
    """transformers samples from the 50 likeliest tokens by default, which a vocabulary of 128 shows."""
    model = sharpened(make_llama(128), 10)
    num_samples = 4000
    samples = sample_responses(
        model, tokenizer, [PROMPTS[0]], num_samples=num_samples, max_new_tokens=1, batch_size=num_samples
    )
    with torch.no_grad():
        probs = model(input_ids=torch.tensor([samples.prompt_ids[0]])).logits[0, -1].double().softmax(-1)
    counts = torch.bincount(torch.tensor([ids[0] for ids in samples.response_ids]), minlength=128)
    deviations = (counts - num_samples * probs) / (num_samples * probs * (1 - probs)).sqrt()
    assert (deviations.square().mean() - 1).abs() < 0.5  # chi-square of 127 degrees of freedom: standard deviation 0.13
    assert deviations.abs().max() < 5


def test_a_response_ends_with_its_first_eos_and_is_decoded_without_it(tokenizer):
    model = make_llama(len(tokenizer))
    eos = tokenizer.eos_token_id
    samples = sample_responses(model, tokenizer, PROMPTS, num_samples=30, max_new_tokens=40, batch_size=64)
    ended = [ids for ids in samples.response_ids if ids[-1] == eos]
    assert len(ended) > 20
    assert all(eos not in ids[:-1] for ids in samples.response_ids)
    assert all(len(ids) == 40 for ids in samples.response_ids if ids[-1] != eos)
    assert not any("</s>" in text for text in samples.responses)


def test_sampling_leaves_the_mode_of_the_model_as_it_was(llama, tokenizer):
    llama.train()
    sample_responses(llama, tokenizer, PROMPTS[:1], max_new_tokens=2)
    assert llama.training


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("num_samples", 0, "num_samples must be at least 1, got 0"),
        ("max_new_tokens", 0, "max_new_tokens must be at least 1, got 0"),
        ("batch_size", -1, "batch_size must be at least 1, got -1"),
        ("temperature", -0.5, "temperature must be >= 0, got -0.5"),
        ("prompts", [], "prompts must hold at least one prompt, got none"),
    ],
)
def test_arguments_out_of_range_are_refused(llama, tokenizer, argument, value, message):
    arguments = {"prompts": PROMPTS, argument: value}
    with pytest.raises(ValueError, match=message):
        sample_responses(llama, tokenizer, **arguments)


def test_the_kl_of_a_model_to_itself_is_zero(llama, tokenizer):
    samples = sample_responses(llama, tokenizer, PROMPTS, max_new_tokens=6)
    assert kl_to_reference(llama, llama, samples).abs().max() == 0


def test_the_kl_estimate_of_one_sample_is_the_sum_of_its_next_token_kls(tokenizer):
    policy, reference = (sharpened(make_llama(len(tokenizer), seed=s), 10) for s in (0, 1))
    samples = sample_responses(policy, tokenizer, PROMPTS, max_new_tokens=7)
    estimates = kl_to_reference(policy, reference, samples, batch_size=3)
    for i in range(len(samples)):
        input_ids = torch.tensor([[*samples.prompt_ids[i], *samples.response_ids[i]]])
        with torch.no_grad():
            p, q = (m(input_ids=input_ids).logits[0].double().log_softmax(-1) for m in (policy, reference))
        rows = slice(len(samples.prompt_ids[i]) - 1, -1)
        expected = (p.exp() * (p - q)).sum(-1)[rows].sum()
        assert estimates[i].item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_mean_kl_estimate_is_the_kl_over_all_responses():
    """A vocabulary of 6 and responses of at most 3 tokens can be enumerated."""
    policy, reference = (sharpened(make_llama(6, seed=s, eos_token_id=2), 40) for s in (0, 1))
    prompt_ids = [1, 4, 5]
    exact = exact_kl(policy, reference, prompt_ids, num_tokens=3, eos=2)
    num_samples = 1500
    drawn = policy.generate(
        torch.tensor([prompt_ids] * num_samples), do_sample=True, top_k=0, max_new_tokens=3, pad_token_id=0
    )[:, 3:]
    responses = [ids[: ids.index(2) + 1] if 2 in ids else ids for ids in drawn.tolist()]
    samples = Samples(("",) * num_samples, ("",) * num_samples, (prompt_ids,) * num_samples, tuple(responses))
    estimates = kl_to_reference(policy, reference, samples, batch_size=500)
    ratios = torch.tensor(
        [sequence_logp(policy, prompt_ids, r) - sequence_logp(reference, prompt_ids, r) for r in responses[:500]]
    )
    stderr = estimates.std() / math.sqrt(num_samples)
    assert exact > 0.1
    assert abs(estimates.mean() - exact) < 4 * stderr
    assert abs(ratios.mean() - exact) < 4 * ratios.std() / math.sqrt(500)
    assert estimates.std() < ratios.std()
