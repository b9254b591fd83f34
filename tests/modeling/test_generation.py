"""Sampling follows the model's own distribution, whatever the model's settings for generation say."""

import pytest
import torch
from tiny import make_llama
from tiny_runs import make_lora

from fastdpo.modeling.generation import DoesNotFit, generate_ids

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


def out_of_memory_beyond(model, most, monkeypatch):
    """Makes the model's generate fail for more sequences; returns the number of sequences of each call."""
    asked, generate = [], model.generate

    def failing(input_ids, **kwargs):
        asked.append(len(input_ids))
        if len(input_ids) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return generate(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model, "generate", failing)
    return asked


def test_a_batch_that_does_not_fit_is_halved_and_so_are_later_ones(monkeypatch):
    model, prompts = make_llama(), [[5, 6, 7], [8, 9], [4], [6, 6], [9, 3, 4], [7]]
    settings = {"pad_id": 0, "eos_ids": [2], "max_new_tokens": 6, "temperature": 0.0}
    expected = [generate_ids(model, [prompt], **settings)[0] for prompt in prompts]
    asked, done = out_of_memory_beyond(model, 2, monkeypatch), []
    assert generate_ids(model, prompts, batch_size=5, progress=done.append, **settings) == expected
    assert asked == [5, 2, 2, 2]
    assert done == [2, 4, 6]


def test_an_answer_that_does_not_fit_by_itself_is_refused_by_its_length(monkeypatch):
    model = make_llama().train()
    own = model.generation_config
    out_of_memory_beyond(model, 0, monkeypatch)
    with pytest.raises(DoesNotFit, match="max_new_tokens must be smaller, got 12: that many and a prompt of 3 tokens"):
        answers(model)
    assert model.training
    assert model.generation_config is own


def test_other_errors_of_generation_are_not_swallowed(monkeypatch):
    def fails(**kwargs):
        raise RuntimeError("index out of range")

    model = make_llama()
    monkeypatch.setattr(model, "generate", fails)
    with pytest.raises(RuntimeError, match="index out of range"):
        answers(model)
