"""Two models have one key only if they give the same log-probs; how a model is held does not change its key."""

import copy

import pytest
import torch
from tiny import make_llama

from fastdpo import prepare_model
from fastdpo.references.fingerprint import reference_facts, reference_key


def key(model, adapter=None, computed_in="no autocast"):
    return reference_key(reference_facts(model, adapter=adapter, computed_in=computed_in))


def with_lora(model, **settings):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    return get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **settings)
    )


def test_a_reload_a_copy_and_a_prepared_model_have_the_key_of_the_model(tmp_path):
    from transformers import AutoModelForCausalLM

    model = make_llama()
    expected = key(model)
    model.save_pretrained(tmp_path)
    assert key(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)) == expected
    assert key(prepare_model(copy.deepcopy(model)).eval().requires_grad_(False)) == expected
    model.config.use_cache = False  # what trainers set on a model before they train it
    model.config.pad_token_id = 0
    model.config.eos_token_id = 7
    assert key(model) == expected


def test_one_training_step_changes_the_key():
    model = make_llama()
    before = key(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    model(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()
    optimizer.step()
    assert key(model) != before


@pytest.mark.parametrize("path", ["model.embed_tokens", "model.layers.1.mlp.down_proj", "model.norm", "lm_head"])
def test_the_last_bit_of_any_weight_counts(path):
    model = make_llama()
    before = key(model)
    weight = model.get_submodule(path).weight
    with torch.no_grad():
        weight.view(torch.int32).view(-1)[-1] ^= 1
    assert key(model) != before


def test_a_weight_larger_than_a_piece_is_hashed_whole(monkeypatch):
    from fastdpo.references import fingerprint

    model = make_llama()
    monkeypatch.setattr(fingerprint, "_PIECE_BYTES", 100)
    before = key(model)
    with torch.no_grad():
        model.lm_head.weight.view(-1)[1] += 1  # in the first of many pieces
    assert key(model) != before


def test_dtype_config_and_autocast_count():
    model = make_llama()
    keys = {key(model), key(copy.deepcopy(model).bfloat16()), key(model, computed_in="bf16 autocast")}
    other = copy.deepcopy(model)
    other.config.rms_norm_eps = 1e-3
    assert len({*keys, key(other)}) == 4


def test_a_lora_that_is_off_leaves_the_key_of_its_base():
    base = make_llama()
    expected = key(base)
    assert key(with_lora(base)) == expected


def test_a_lora_that_is_on_counts_with_its_weights_and_its_scale():
    keys = {key(make_llama())}
    for settings in ({}, {"lora_alpha": 99}):
        model = with_lora(make_llama(), **settings)
        keys.add(key(model, adapter="default"))
        with torch.no_grad():
            next(p for name, p in model.named_parameters() if "lora_B" in name)[0, 0] = 1.0
        keys.add(key(model, adapter="default"))
    assert len(keys) == 5


class Quantized(torch.nn.Linear):
    """Keeps the scale of its weight where bitsandbytes does: on the weight, saved under a name of its own."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight.absmax"] = self.weight.absmax


def with_scale(scale):
    model = make_llama()
    layer = Quantized(32, 32, bias=False)
    layer.weight.data.zero_()
    layer.weight.absmax = torch.tensor([scale])
    model.model.layers[0].self_attn.q_proj = layer
    return model


def test_scales_of_quantized_weights_count():
    assert key(with_scale(1.0)) == key(with_scale(1.0)) != key(with_scale(2.0))


def test_the_tensors_inside_a_wrapped_weight_count():
    from torch.testing._internal.two_tensor import TwoTensor

    def wrapped(second):
        model = make_llama()
        norm = model.model.norm
        norm.weight = torch.nn.Parameter(TwoTensor(norm.weight.detach().clone(), torch.full((32,), second)))
        return model

    assert key(wrapped(1.0)) == key(wrapped(1.0)) != key(wrapped(2.0))
