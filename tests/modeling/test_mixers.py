"""Models that mix tokens outside attention, packed and shared: the log-probs and gradients of separate forwards, which
modules are found, and what the self-check says of those that cannot be helped.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from hybrids import HYBRIDS, WholeDoubles, build_hybrid
from test_packed_logps import GROUPS, MODELS, VOCAB, assert_same, build, gradients, separate_sums

from fastdpo import TokenizedGroup, TokenizedPair, pack_pairs, packed_logps, pad_pairs
from fastdpo.modeling import check_packing, prepared
from fastdpo.modeling.mixers import adapter, mixers_of
from fastdpo.modeling.mixers.adapter import run_with_boundaries
from fastdpo.modeling.mixers.rows import MixerRows
from fastdpo.modeling.prepared import unprepare_model

SHARING = [pytest.param(True, id="shared"), pytest.param(False, id="unshared", marks=pytest.mark.slow)]


@pytest.mark.parametrize("prefix_sharing", SHARING)
@pytest.mark.parametrize("model_type", HYBRIDS)
def test_packed_equals_separate_forwards_of_the_stock_model(model_type, prefix_sharing):
    """In fp64 throughout, where gradients of decays and steps keep their digits too."""
    model = build_hybrid(model_type).double()
    with WholeDoubles():
        expected = separate_sums(model)
        expected_grads = gradients(model, expected)
        found = packed_logps(model, pack_pairs(GROUPS, prefix_sharing=prefix_sharing)).sequences.sums
        found_grads = gradients(model, found)
    assert list(mixers_of(model).names) == HYBRIDS[model_type][1]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert found_grads.keys() == expected_grads.keys()
    for name, grad in expected_grads.items():
        torch.testing.assert_close(found_grads[name], grad, rtol=1e-8, atol=1e-9, msg=name)


@pytest.mark.parametrize("model_type", HYBRIDS)
def test_the_self_check_passes_and_leaves_the_model_as_it_was(model_type):
    model = build_hybrid(model_type).train()
    weights, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    check = check_packing(model)
    assert check.ok, check.reason
    assert list(mixers_of(model).names) == HYBRIDS[model_type][1]
    assert check.reason.endswith("over prefix and branch")
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.are_deterministic_algorithms_enabled()
    model.train()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "mixtral", "gpt_oss", "qwen3_moe", "gpt2"])
def test_no_mixer_is_found_where_attention_alone_mixes(model_type):
    model = build(model_type)
    packed_logps(model, pack_pairs(GROUPS))
    assert mixers_of(model).names == mixers_of(model).leaks == ()


FEW = ["qwen3_next", "granitemoehybrid", "lfm2", "mamba", "rwkv", "recurrent_gemma"]
LONG = [  # sequences past a chunk of 64 tokens, which differ in which branch is the longer one
    TokenizedPair(list(range(1, 60)), [3, 4, 5], list(range(10, 40))),
    TokenizedPair(list(range(20, 60)), list(range(1, 48)), [9]),
    TokenizedGroup([], [[5, 6, 7, 8], [6], [5, 6]], preferences=[(0, 1), (0, 2)]),  # nothing stands before the first
]


def long_sums(model):
    """(7,) log-probs of LONG's responses from separate forwards; a first token that nothing stands before is free."""
    sums = []
    for group in LONG:
        for response in group.responses:
            ids = torch.tensor([[*group.prompt_ids, *response]])
            logps = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
            sums.append(logps.gather(-1, ids[0, 1:, None])[max(len(group.prompt_ids) - 1, 0) :].sum())
    return torch.stack(sums)


@pytest.mark.parametrize("model_type", FEW)
def test_sequences_longer_than_a_chunk_and_prompts_of_nothing_are_exact(model_type):
    model, weights = build_hybrid(model_type).double(), torch.linspace(-1.0, 1.3, 7).double()
    with WholeDoubles():
        expected = long_sums(model)
        (expected * weights).sum().backward()
        expected_grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        actual = packed_logps(model, pack_pairs(LONG)).sequences.sums
        (actual * weights).sum().backward()
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    assert {name for name, p in model.named_parameters() if p.grad is not None} == expected_grads.keys()
    for name, grad in expected_grads.items():
        torch.testing.assert_close(model.get_parameter(name).grad, grad, rtol=1e-8, atol=1e-9, msg=name)


@pytest.mark.parametrize("settings", [{}, {"use_reentrant": False}, {"use_reentrant": True}], ids=str)
@pytest.mark.parametrize("model_type", FEW)
def test_layers_run_again_in_backward_find_the_rows_of_their_own_forward(model_type, settings):
    """Two batches before one backward: whatever ran last must not decide what is recomputed."""
    batches = [pack_pairs(GROUPS[:2]), pack_pairs(GROUPS[1::-1])]
    assert batches[0].input_ids.shape == batches[1].input_ids.shape
    model = build_hybrid(model_type)
    for batch, weight in zip(batches, (1.0, 0.3), strict=True):
        (weight * packed_logps(model, batch).chosen.sum() - packed_logps(model, batch).rejected.sum()).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    model.gradient_checkpointing_enable(settings)
    model.enable_input_require_grads()
    model.train()
    logps = [packed_logps(model, batch) for batch in batches]
    with torch.no_grad():  # as sampling during training does
        model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False)
    sum(weight * y.chosen.sum() - y.rejected.sum() for y, weight in zip(logps, (1.0, 0.3), strict=True)).backward()
    floor = 0.05 * torch.stack([grad.norm() for grad in expected.values()]).median()
    for name, grad in expected.items():
        error = (model.get_parameter(name).grad - grad).norm() / grad.norm().clamp(min=floor)
        assert error < 1e-5, f"{name}: {error:.1e}"


@pytest.mark.parametrize("model_type", FEW)
def test_adapters_get_the_gradients_of_separate_forwards(model_type):
    import peft

    target = ["in_proj", "x_proj"] if model_type == "mamba" else "all-linear"  # PEFT refuses Mamba's other ones
    config = peft.LoraConfig(r=4, target_modules=target, init_lora_weights=False)
    model = peft.get_peft_model(build_hybrid(model_type), config).eval()
    assert_same(model, pack_pairs(GROUPS))
    assert list(mixers_of(model.get_base_model()).names) == HYBRIDS[model_type][1]


@pytest.mark.parametrize("model_type", FEW)
def test_every_other_call_runs_the_model_as_it_came(model_type):
    model = build_hybrid(model_type)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    expected = model(input_ids=ids, use_cache=False).logits
    generated = model.generate(ids, max_new_tokens=6, do_sample=False)
    packed_logps(model, pack_pairs(GROUPS))
    torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, expected)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), generated)
    torch.testing.assert_close(
        packed_logps(model, pad_pairs(GROUPS)).sequences.sums, separate_sums(model), rtol=1e-5, atol=1e-5
    )


def test_a_copy_has_mixers_of_its_own():
    model = build_hybrid("lfm2")
    packed_logps(model, pack_pairs(GROUPS))
    twin = copy.deepcopy(model)
    before = packed_logps(twin, pack_pairs(GROUPS)).chosen.detach()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    packed_logps(model, pack_pairs(GROUPS[:1]))
    torch.testing.assert_close(packed_logps(twin, pack_pairs(GROUPS)).chosen, before)


def test_taking_the_packed_branch_out_takes_the_adapters_out_and_they_are_not_looked_for_again(monkeypatch):
    model = build_hybrid("lfm2")
    before = packed_logps(model, pack_pairs(GROUPS)).chosen
    unprepare_model(model)
    assert not [name for name, module in model.named_modules() if "forward" in module.__dict__]
    monkeypatch.setattr(prepared, "find_mixers", lambda *_: pytest.fail("looked for again"))
    torch.testing.assert_close(packed_logps(model, pack_pairs(GROUPS)).chosen, before)


def test_a_mixer_that_is_called_around_the_models_forward_says_so():
    model = build_hybrid("mamba")
    packed_logps(model, pack_pairs(GROUPS))
    with pytest.raises(ValueError, match=r"backbone.layers.0.mixer must run on the 39 rows"):
        model.backbone(input_ids=torch.tensor([[1, 2, 3]]))


def test_sequences_of_about_one_length_run_together_and_prefixes_once_more_for_each_branch(monkeypatch):
    calls = []
    model = build_hybrid("lfm2", num_hidden_layers=1, layer_types=["conv"])
    module = model.model.layers[0].conv
    stock = module.forward
    module.forward = lambda hidden_states, **kwargs: calls.append(hidden_states.shape) or stock(hidden_states, **kwargs)
    batch = pack_pairs([TokenizedPair([1, 2, 3, 4, 5, 6], [7, 8], [9]), TokenizedPair([1, 2], [3], [4])])
    packed_logps(model, batch)
    calls.clear()
    packed_logps(model, batch)
    assert calls == [(2, 8, 32), (2, 3, 32)]


# What the self-check sees


@pytest.fixture
def without_adapters(monkeypatch):
    """Mixers run over the whole packed row, as they would were they not known."""
    monkeypatch.setattr(adapter, "run_sequences", lambda forward, rows, args, kwargs: forward(*args, **kwargs))


@pytest.mark.parametrize(
    ("initializer_range", "why"),
    [(0.2, "log-probs differ from separate ones"), (0.002, "conv mix the tokens of one sequence into another")],
)
def test_a_leak_does_not_hide_behind_small_weights(initializer_range, why, without_adapters):
    """At 0.002 convolutions of LFM2 change a log-prob by less than rounding does."""
    check = check_packing(build_hybrid("lfm2", spread=0.0, initializer_range=initializer_range))
    assert not check.ok
    assert why in check.reason
    assert (check.error < 1e-6) == (initializer_range == 0.002)


@pytest.mark.parametrize("is_further", [False, True], ids=["first branch", "further branch"])
def test_a_fault_past_a_chunk_is_seen_in_whichever_branch_it_is(is_further, monkeypatch):
    """As of a kernel that loses the state between its chunks of 64 tokens, in prefix + first branch or in a copy."""
    run_sequences, hit = adapter.run_sequences, []

    def faulty(forward, rows, args, kwargs):
        output = run_sequences(forward, rows, args, kwargs)
        for (start, end, _, _), length, num_prefix in zip(rows.segments, rows.lengths, rows.num_prefix, strict=True):
            if length > 64 and (num_prefix > 0) == is_further:
                lost = torch.arange(start, end) + num_prefix - start >= 64
                output[:, start:end] = output[:, start:end] * (~lost)[:, None]
                hit.append(int(lost.sum()))
        return output

    model = build_hybrid("lfm2", spread=0.15)
    assert check_packing(model).ok
    monkeypatch.setattr(adapter, "run_sequences", faulty)
    assert not check_packing(model).ok
    assert sum(hit) > 0


@pytest.mark.parametrize("model_type", ["qwen3_5_text", "bamba", "mamba"])
def test_mixers_with_small_weights_are_found(model_type):
    model = build_hybrid(model_type, spread=0.0, initializer_range=0.002)
    assert check_packing(model).ok
    assert list(mixers_of(model).names) == HYBRIDS[model_type][1]


class Accumulates(torch.nn.Module):
    """The mean of all tokens so far, to which their order is all the same."""

    def forward(self, hidden_states):
        count = torch.arange(1, hidden_states.shape[1] + 1)[:, None]
        return hidden_states + 1e-3 * hidden_states.cumsum(1) / count


class ShiftsAttention(torch.nn.Module):
    """Mixes in a module that also calls attention, where nothing can be put around it."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, hidden_states, **kwargs):
        shifted = F.pad(hidden_states, (0, 0, 1, -1))
        return self.attention(hidden_states=hidden_states + shifted, **kwargs)


def test_a_mixer_that_transformers_does_not_know_is_found():
    model = build("llama")
    model.model.layers[1].mlp = torch.nn.Sequential(model.model.layers[1].mlp, Accumulates())
    assert_same(model, pack_pairs(GROUPS))
    assert mixers_of(model).names == ("model.layers.1.mlp.1",)


def test_attention_that_mixes_before_it_attends_is_a_leak_with_a_name():
    model = build("llama")
    model.model.layers[1].self_attn = ShiftsAttention(model.model.layers[1].self_attn)
    check = check_packing(model)
    assert not check.ok
    assert mixers_of(model).leaks == ("model.layers.1",)


@pytest.mark.parametrize("model_type", ["gemma3n_text", "gemma4_text"])
def test_layers_that_use_the_keys_of_other_layers_are_no_leak(model_type):
    """They cannot be run by themselves."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    torch.manual_seed(0)
    settings = {**MODELS["gemma4_text"], "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB}
    settings |= {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.0] * 4}
    settings |= {"layer_types": ["sliding_attention", "full_attention"] * 2}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**settings)).eval()
    check = check_packing(model)
    assert check.ok, check.reason
    assert mixers_of(model).names == mixers_of(model).leaks == ()


@pytest.mark.slow
def test_a_compiled_model_runs_its_mixers_as_they_are():
    model = build_hybrid("lfm2", num_hidden_layers=1, layer_types=["conv"])
    expected = packed_logps(model, pack_pairs(GROUPS)).sequences.sums
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    for batch in (pack_pairs(GROUPS), pack_pairs(GROUPS[:2]), pack_pairs(GROUPS)):
        actual = packed_logps(compiled, batch).sequences.sums
        torch.testing.assert_close(actual, expected[: len(actual)], rtol=1e-5, atol=1e-5)
        actual.sum().backward()


def test_a_model_in_half_precision_has_the_mixers_of_its_copy_in_single():
    model = build_hybrid("lfm2").to(torch.bfloat16)
    check = check_packing(model)
    assert check.ok, check.reason
    assert list(mixers_of(model).names) == HYBRIDS["lfm2"][1]


# Kernels that keep boundaries


def gathered_calls(monkeypatch, convolve):
    """Puts a stand-in for causal-conv1d's kernel into LFM2, which takes `seq_idx`; returns the shapes of its calls."""
    from transformers.models.lfm2 import modeling_lfm2

    calls = []

    def kernel(hidden_states, weight, bias=None, activation=None, seq_idx=None, **kwargs):
        calls.append((tuple(hidden_states.shape), seq_idx is not None))
        return convolve(hidden_states, weight, bias, seq_idx)

    monkeypatch.setattr(modeling_lfm2, "causal_conv1d_fn", kernel)
    return calls


def by_sequence(hidden_states, weight, bias, seq_idx):
    """(1, C, T) with a kernel of some width, whose taps stop at the start of a sequence."""
    width, output = weight.shape[-1], 0
    for back in range(width):
        shifted = F.pad(hidden_states, (back, 0))[:, :, : hidden_states.shape[2]]
        if seq_idx is not None:
            same = F.pad(seq_idx, (back, 0), value=-1)[:, : seq_idx.shape[1]] == seq_idx
            shifted = shifted * same[:, None]
        output = output + shifted * weight[:, width - 1 - back, None]
    return output if bias is None else output + bias[:, None]


def across_sequences(hidden_states, weight, bias, seq_idx):
    return by_sequence(hidden_states, weight, bias, None)


def test_a_kernel_that_keeps_boundaries_runs_once_over_all_sequences(monkeypatch):
    model = build_hybrid("lfm2")
    expected = separate_sums(model)
    expected_grads = gradients(model, expected)
    calls = gathered_calls(monkeypatch, by_sequence)
    batch = pack_pairs(GROUPS)
    packed_logps(model, batch)
    assert mixers_of(model).by_boundaries == set(HYBRIDS["lfm2"][1])
    calls.clear()
    actual = packed_logps(model, batch).sequences.sums
    assert calls == [((1, 32, len(batch.varlen.key_rows)), True)] * 2
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    for name, grad in gradients(model, actual).items():
        assert (grad - expected_grads[name]).norm() <= 1e-5 * expected_grads[name].norm().clamp(min=1e-2), name


def test_a_module_gets_the_boundaries_that_its_forward_takes():
    """LFM2's convolution takes `seq_idx` and no further keywords before transformers 5.23."""
    batch, seen = pack_pairs(GROUPS), []
    rows = MixerRows(batch.segments, batch.varlen)

    def forward(hidden_states, seq_idx=None):
        seen.append(seq_idx)
        return hidden_states

    hidden = torch.randn(1, batch.input_ids.shape[1], 4)
    torch.testing.assert_close(run_with_boundaries(forward, rows, (hidden,), {}), hidden)
    assert seen[0].shape == (1, len(batch.varlen.key_rows))


def test_a_kernel_that_only_takes_boundaries_is_not_trusted_with_them(monkeypatch):
    model = build_hybrid("lfm2")
    expected = separate_sums(model)
    calls = gathered_calls(monkeypatch, across_sequences)
    assert check_packing(model).ok
    assert mixers_of(model).by_boundaries == set()
    calls.clear()
    torch.testing.assert_close(packed_logps(model, pack_pairs(GROUPS)).sequences.sums, expected, rtol=1e-5, atol=1e-6)
    assert not any(has_boundaries for _, has_boundaries in calls)


def test_a_kernel_that_loses_boundaries_between_chunks_is_not_trusted(monkeypatch):
    model = build_hybrid("lfm2")

    def convolve(hidden_states, weight, bias, seq_idx):
        output = by_sequence(hidden_states, weight, bias, seq_idx)
        for start in range(64, output.shape[2], 64):  # whosever row stands before a chunk reaches it
            output[:, :, start : start + 64] += hidden_states[:, :, start - 1, None]
        return output

    gathered_calls(monkeypatch, convolve)
    packed_logps(model, pack_pairs(GROUPS))
    assert mixers_of(model).by_boundaries == set()


def test_a_kernel_that_keeps_boundaries_in_evaluation_only_is_not_trusted(monkeypatch):
    model = build_hybrid("lfm2")
    module = model.model.layers[0].conv

    def convolve(hidden_states, weight, bias, seq_idx):
        return by_sequence(hidden_states, weight, bias, None if module.training else seq_idx)

    gathered_calls(monkeypatch, convolve)
    packed_logps(model, pack_pairs(GROUPS))
    assert mixers_of(model).by_boundaries == {"model.layers.2.conv"}


def test_a_table_of_distances_between_rows_is_that_of_each_sequence():
    """Inkling 2's attention gets one from its decoder since transformers 5.24."""
    batch, seen = pack_pairs(GROUPS[:1]), []
    num_rows = batch.input_ids.shape[1]
    distances = torch.arange(num_rows)[:, None] - torch.arange(num_rows)

    def layer(hidden_states, relative_distance):
        seen.append(relative_distance)
        return hidden_states

    rows = MixerRows(batch.segments, batch.varlen)
    hidden = torch.randn(1, num_rows, 4)
    output = adapter.run_sequences(layer, rows, (hidden,), {"relative_distance": distances})
    torch.testing.assert_close(output, hidden)
    lengths = sorted(len(table) for table in seen)
    assert lengths == [9, 11] or lengths == [11]
    for table in seen:
        assert table[0, 0] == 0
        assert table[-1, 0] == len(table) - 1  # not the rows' distance behind the first branch
