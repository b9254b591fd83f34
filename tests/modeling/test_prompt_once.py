"""A prompt that runs once for several batches of its responses gives the gradient of separate forwards."""

import pytest
import torch
from closeness import relative_error
from hybrids import build_hybrid
from test_attention_backends import CASES
from test_packed_logps import MODELS, build
from tiny import make_llama
from varlen_emulation import EMULATIONS

from fastdpo import pack_pairs, packed_logps, prepare_model
from fastdpo.modeling.attention import BACKENDS, PrefixRefused
from fastdpo.modeling.prepared import run_mixers_packed
from fastdpo.modeling.prompt_once import after_prompt, loss_after_prompt, prefix_of, why_prompt_repeats
from fastdpo.types import TokenizedGroup

PROMPT = [5, 6, 7, 8, 9, 10]
# one response; two that share two tokens, one of which ends there; two of which one has a single token
PARTS = [[[11, 12, 13, 14, 15]], [[32, 33, 34, 35], [32, 33, 36], [32, 33]], [[16, 17], [18]]]
WEIGHTS = [0.3, -1.0, 0.7, 1.3, -0.4, 0.9]


def batches(prompt=PROMPT):
    return [pack_pairs([TokenizedGroup(prompt, part, preferences=())]) for part in PARTS]


def losses():
    found, begin = [], 0
    for part in PARTS:
        weights = torch.tensor(WEIGHTS[begin : begin + len(part)])
        found.append(lambda sums, lengths, sequences, pairs, weights=weights: (weights[sequences] * sums).sum())
        begin += len(part)
    return found


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def of_parts(model, prompt=PROMPT):
    model.zero_grad()
    for batch, loss_of in zip(batches(prompt), losses(), strict=True):
        sums = packed_logps(model, batch).sequences.sums
        loss_of(sums, None, slice(None), None).backward()
    return gradients(model)


def once(model, prompt=PROMPT, **settings):
    model.zero_grad()
    loss = loss_after_prompt(model, batches(prompt), len(prompt), losses(), **settings)
    assert loss.item() == 0.0
    (3.0 * loss).backward()
    return {name: grad / 3.0 for name, grad in gradients(model).items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    floor = 0.05 * torch.stack([grad.norm() for grad in expected.values()]).median()
    for name, grad in expected.items():
        assert (found[name] - grad).norm() / grad.norm().clamp(min=floor) < 1e-5, name


@pytest.mark.parametrize("model_type", MODELS)
def test_the_gradient_is_that_of_a_prompt_per_batch(model_type):
    model = build(model_type)
    expected = of_parts(model)
    assert why_prompt_repeats(model) == ("layers count rows" if model_type == "opt" else "")
    if not why_prompt_repeats(model):
        assert_same(once(model), expected)


@pytest.mark.parametrize(("backend", "model_type"), [case for case in CASES if case[0] != "mask"])
def test_every_backend_attends_to_the_prompt_that_ran_before(backend, model_type, monkeypatch):
    model = build(model_type)
    expected = of_parts(model)
    if backend in EMULATIONS:
        monkeypatch.setitem(BACKENDS, backend, EMULATIONS[backend]())
    prepare_model(model, attention_backend=backend)
    assert_same(once(model), expected)
    if backend in EMULATIONS:
        kernel = BACKENDS[backend]
        assert kernel.num_calls == (1 + len(PARTS)) * model.config.num_hidden_layers


@pytest.mark.parametrize("prompt", [PROMPT, PROMPT[:1]], ids=len)
@pytest.mark.parametrize("impl", ["tiled", "reference"])
def test_the_prompt_runs_once_and_checkpointed_layers_are_not_recorded_again(prompt, impl):
    model = make_llama(vocab_size=64, tie_word_embeddings=True).train()
    expected = of_parts(model, prompt)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    embedded, ran = [], []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, args: embedded.append(args[0].shape[1]))
    model.model.layers[0].mlp.register_forward_pre_hook(lambda _, args: ran.append(args[0].shape[1]))
    assert_same(once(model, prompt, impl=impl), expected)
    responses = [5, 4 + 1 + 1, 2 + 1]
    assert embedded == [len(prompt), *responses]
    assert ran == [len(prompt), *(length for length in responses for _ in range(2)), len(prompt)]


def test_autocast_is_that_of_the_forward():
    model = make_llama(vocab_size=64).train()
    exact, dtypes = of_parts(model), []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = of_parts(model)
    model.zero_grad()
    model.model.layers[0].mlp.register_forward_hook(lambda _, args, output: dtypes.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_after_prompt(model, batches(), len(PROMPT), losses())
    loss.backward()
    assert dtypes == [torch.bfloat16] * (1 + len(PARTS))
    for name, found in gradients(model).items():
        assert relative_error(found, exact[name]) <= 2 * relative_error(plain[name], exact[name]) + 1e-7, name


def test_a_frozen_part_of_the_model_gets_no_gradient():
    model = make_llama(vocab_size=64).train()
    model.requires_grad_(False)
    model.model.layers[1].self_attn.v_proj.requires_grad_(True)
    expected = of_parts(model)
    assert_same(once(model), expected)
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    expected = of_parts(model)
    assert expected.keys() == {"lm_head.weight"}
    assert_same(once(model), expected)


def test_a_batch_after_its_prompt_reads_like_this():
    batch = after_prompt(pack_pairs([TokenizedGroup([1, 2], [[3, 4], [5]], preferences=())]), 2)
    assert batch.input_ids.tolist() == [[3, 4, 5]]
    assert batch.position_ids.tolist() == [[2, 3, 2]]
    assert batch.segments == ((2, 4, 0, 2), (4, 5, 0, 2))
    assert batch.logit_rows.tolist() == [0, 1, 0]
    assert batch.varlen.key_rows.tolist() == [0, 1, 2, 3, 0, 1, 4]
    assert batch.varlen.cu_queries.tolist() == [0, 2, 3]


def test_log_probs_after_a_prompt_are_those_of_whole_sequences():
    model = make_llama(vocab_size=64).eval()
    with torch.no_grad():
        prefix = prefix_of(model, batches()[0], len(PROMPT))
        for batch in batches():
            expected = packed_logps(model, batch).sequences.sums
            found = packed_logps(model, after_prompt(batch, len(PROMPT)), prefix=prefix).sequences.sums
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# What cannot run so


def test_layers_that_mix_tokens_by_themselves_repeat_the_prompt():
    model = prepare_model(build_hybrid("lfm2"))
    run_mixers_packed(model)
    assert why_prompt_repeats(model) == "layers mix tokens outside attention"


def test_a_mask_over_the_row_repeats_the_prompt():
    model = prepare_model(make_llama(), attention_backend="mask")
    assert why_prompt_repeats(model) == "layers read a mask of the whole row"


def test_a_layer_that_runs_twice_is_refused():
    model = make_llama(vocab_size=64)
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(PrefixRefused, match="LlamaAttention attends more than once in a forward"):
        once(model)


def test_reentrant_checkpointing_is_refused():
    model = make_llama(vocab_size=64).train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(PrefixRefused, match="LlamaAttention runs without a graph"):
        once(model)
