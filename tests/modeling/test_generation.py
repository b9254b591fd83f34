"""Sampling follows the model's own distribution, whatever the model's settings for generation say."""

import pytest
import torch
from tiny import make_llama
from tiny_runs import make_lora

from fastdpo.modeling.generation import generate_ids

PROMPTS = [[5, 6, 7], [8, 9]]


def answers(model, **settings):
    return generate_ids(model, PROMPTS, pad_id=0, eos_ids=[2], max_new_tokens=12, **settings)


@pytest.mark.parametrize("has_adapter", [False, True], ids=["bare", "LoRA"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_settings_of_the_model_do_not_bend_it(has_adapter, temperature):
    from peft import get_peft_model

    model = make_llama()
    if has_adapter:
        model = get_peft_model(model, make_lora())
    expected = answers(model, temperature=temperature)
    own = model.generation_config
    own.update(repetition_penalty=5.0, min_new_tokens=9, suppress_tokens=[22, 1], top_k=1)
    assert answers(model, temperature=temperature) == expected
    assert model.generation_config is own


def test_the_random_state_and_the_mode_are_left_as_they_were():
    model, state = make_llama().train(), torch.random.get_rng_state()
    first, again, other = answers(model), answers(model), answers(model, seed=1)
    assert first == again != other
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
