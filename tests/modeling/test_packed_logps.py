"""packed_logps against separate unpadded forwards of the stock model: log-probs and every parameter's gradient."""

import copy
import inspect

import pytest
import torch
from closeness import assert_as_exact, assert_gradients_as_exact
from releases import config_of
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fastdpo import TokenizedGroup, TokenizedPair, pack_pairs, packed_logps, pad_pairs, prepare_model
from fastdpo.modeling import check_packing
from fastdpo.modeling.prepared import unprepare_model

VOCAB = 67
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
GEMMA = {**SMALL, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4, "num_hidden_layers": 4}
GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
GPT2_NO_DROPOUT = {**GPT2, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
MODELS = {
    "llama": SMALL,
    "qwen2": SMALL,
    "qwen3": {**SMALL, "head_dim": 8},
    "mistral": {**SMALL, "sliding_window": 4},
    "gemma2": {**GEMMA, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0},
    "gemma3_text": GEMMA,
    "gpt2": GPT2_NO_DROPOUT,
    "gpt_neox": SMALL,
    "phi": {**SMALL, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "phi3": SMALL,
    "olmo2": SMALL,
    "opt": {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "dropout": 0.0,
    },
    "cohere": {**SMALL, "logit_scale": 0.25},
    "granite": {**SMALL, "logits_scaling": 4.0},
    "smollm3": SMALL,
    "gpt_oss": {**SMALL, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
    "qwen3_moe": {**SMALL, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "mixtral": {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma": {**SMALL, "head_dim": 8},
    "gemma4_text": {**GEMMA, "global_head_dim": 8, "hidden_size_per_layer_input": 0},
    "olmo3": {**SMALL, "sliding_window": 4},
    "cohere2": {**SMALL, "sliding_window": 4, "logit_scale": 0.25, "head_dim": 8},
    "glm4": {**SMALL, "head_dim": 8},
    "ernie4_5": {**SMALL, "head_dim": 8},
    "internlm3": SMALL,
    "starcoder2": {**SMALL, "residual_dropout": 0.0, "embedding_dropout": 0.0},
}
REQUIRED = ["llama", "qwen3", "gemma2", "gemma3_text", "gpt2", "phi"]
GROUPS = [
    TokenizedPair([5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15], [16, 17, 18]),
    TokenizedPair([20], [21], [22, 23, 24, 25, 26, 27, 28]),
    TokenizedPair([30, 31], [32, 33, 34, 35], [32, 33, 36]),  # the responses share two tokens
    TokenizedGroup([40, 41, 42], [[43, 44], [45], [46, 47, 48]], preferences=[(0, 1), (2, 1)]),
]
# every sequence counts with a weight of its own, so that no two gradients can cancel or be swapped unseen
WEIGHTS = torch.linspace(-1.0, 1.3, sum(len(g.responses) for g in GROUPS))


def build(model_type, **overrides):
    torch.manual_seed(0)
    config = config_of(model_type)(**{**MODELS[model_type], **overrides})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():  # spread the random weights, so that logits and leaks are of size 1
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.eval()


def separate_sums(model, groups=GROUPS):
    sums = []
    for group in groups:
        for response in group.responses:
            ids = torch.tensor([[*group.prompt_ids, *response]])
            logps = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
            rows = torch.arange(len(group.prompt_ids) - 1, ids.shape[1] - 1)
            sums.append(logps[rows, ids[0, rows + 1]].sum())
    return torch.stack(sums)


def gradients(model, sums):
    model.zero_grad()
    (sums * WEIGHTS).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model, batch):
    double = copy.deepcopy(model).double()
    if hasattr(double.config, "num_experts_per_tok"):
        double.set_experts_implementation("eager")  # the default has no fp64
    exact, plain = separate_sums(double), separate_sums(model)
    plain_grads, exact_grads = gradients(model, plain), gradients(double, exact)
    found = packed_logps(model, batch).sequences.sums
    assert_as_exact([found], [plain], [exact], floor=2e-7)
    assert_gradients_as_exact(gradients(model, found), plain_grads, exact_grads)


@pytest.mark.parametrize("prefix_sharing", [True, False], ids=["shared", "unshared"])
@pytest.mark.parametrize("model_type", MODELS)
def test_packed_equals_separate_forwards_of_the_stock_model(model_type, prefix_sharing):
    assert_same(build(model_type), pack_pairs(GROUPS, prefix_sharing=prefix_sharing))


@pytest.mark.parametrize("model_type", REQUIRED)
def test_padded_equals_separate_forwards_of_the_stock_model(model_type):
    assert_same(build(model_type), pad_pairs(GROUPS))


def test_tied_embeddings_receive_both_gradients():
    assert_same(build("llama", tie_word_embeddings=True), pack_pairs(GROUPS))


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_gradient_checkpointing_changes_nothing(model_type):
    """Layers run again in backward, outside any forward: they must find the packed attention there."""
    model = build(model_type)
    expected = gradients(model, separate_sums(model))
    model.gradient_checkpointing_enable()
    model.train()  # checkpointing is active in training mode only; these configs have no dropout
    sums = packed_logps(model, pack_pairs(GROUPS)).sequences.sums
    with torch.no_grad():  # a call on the original attention in between, as sampling during training makes
        model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False)
    actual = gradients(model, sums)
    for name, expected_grad in expected.items():
        assert (actual[name] - expected_grad).norm() <= 1e-5 * expected_grad.norm().clamp(min=1e-6), name


@pytest.mark.parametrize(
    "model_type", ["llama", "gpt2"]
)  # gpt2 has learned positions, which padding on the left shifts
def test_a_prepared_model_still_forwards_and_generates_as_before(model_type):
    stock = build(model_type)
    ids = torch.tensor([[0, 0, 5, 6, 7], [5, 6, 7, 8, 9]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    expected = stock(input_ids=ids, attention_mask=mask).logits
    settings = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    expected_output = stock.generate(ids, output_logits=True, **settings)
    model = prepare_model(copy.deepcopy(stock))
    packed_logps(model, pack_pairs(GROUPS))
    torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits, expected)
    output = model.generate(ids, output_logits=True, **settings)
    assert torch.equal(output.sequences, expected_output.sequences)
    torch.testing.assert_close(output.logits, expected_output.logits)


def test_a_prepared_model_shows_the_arguments_of_its_own_forward():
    """transformers decides by them, as on `logits_to_keep`, without which a long prompt would get all its logits."""
    stock = build("llama")
    expected = inspect.signature(stock.forward)
    model = prepare_model(stock)
    assert inspect.signature(model.forward) == expected
    assert inspect.signature(copy.deepcopy(model).forward) == expected


def test_models_that_share_a_config_object_each_keep_their_own_attention():
    first = build("llama")
    prepare_model(first)
    packed_logps(first, pack_pairs(GROUPS))
    second = type(first)(first.config).eval()
    expected = first(torch.tensor([[5, 6, 7]])).logits
    packed_logps(first, pack_pairs(GROUPS))
    prepare_model(second)
    assert check_packing(second).ok
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(second(torch.tensor([[5, 6, 7]])).logits, expected)
    torch.testing.assert_close(first(torch.tensor([[5, 6, 7]])).logits, expected)


def test_a_copy_of_a_prepared_model_is_a_model_of_its_own():
    model = prepare_model(build("llama"))
    packed_logps(model, pack_pairs(GROUPS))
    twin = copy.deepcopy(model)
    before = packed_logps(twin, pack_pairs(GROUPS)).chosen.detach()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(packed_logps(twin, pack_pairs(GROUPS)).chosen, before)


def test_preparing_is_idempotent_and_can_be_undone(tmp_path):
    model = build("llama")
    prepare_model(prepare_model(model))
    forward = model.forward
    prepare_model(model)
    assert model.forward is forward
    packed_logps(model, pack_pairs(GROUPS))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation != "fastdpo_packed"
    unprepare_model(model)
    assert "forward" not in model.__dict__
    assert model.config._attn_implementation == "eager"


def test_only_response_rows_reach_the_head():
    batch = pack_pairs(GROUPS[:1])
    assert batch.input_ids.shape == (1, 14)
    tokens = packed_logps(build("llama"), batch, outputs=("lse",)).sequences.tokens
    assert tokens.logps.shape == tokens.lse.shape == (8,)  # 5 chosen and 3 rejected tokens


def test_per_token_statistics_come_back_when_asked_for():
    model = build("gemma2")
    tokens = packed_logps(model, pack_pairs(GROUPS[:1]), outputs=("entropy", "is_top1")).sequences.tokens
    logits = model(input_ids=torch.tensor([[5, 6, 7, 8, 9, 10, 11]])).logits[0, 5]
    probs = logits.softmax(-1)
    assert tokens.entropy[0].item() == pytest.approx(-(probs * probs.log()).sum().item(), rel=1e-4)
    assert tokens.is_top1[0].item() == (logits.argmax().item() == 11)
    assert tokens.lse is None


def test_packed_logps_runs_under_autocast():
    model = build("llama")
    exact = packed_logps(model, pack_pairs(GROUPS)).chosen
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = packed_logps(model, pack_pairs(GROUPS)).chosen
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 0.02 * exact.abs().max()


@pytest.mark.parametrize("model_type", MODELS)
def test_the_self_check_passes_where_packing_is_exact(model_type):
    model = build(model_type).train()
    state = torch.random.get_rng_state()
    check = check_packing(model)
    assert check.ok, check.reason
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.fixture
def without_window(monkeypatch):
    """Layers that do not hand their window to attention: it lives in their mask alone."""
    from fastdpo.modeling import attention

    packed_attention = attention.packed_attention
    monkeypatch.setattr(attention, "packed_attention", lambda *a, sliding_window=None, **k: packed_attention(*a, **k))
    attention.register()
    yield monkeypatch
    monkeypatch.undo()
    attention.register()


def test_a_window_that_lives_in_the_mask_alone_is_read_off_it_though_the_probe_is_shorter(without_window):
    model = build("mistral", sliding_window=64)
    assert check_packing(model).ok
    groups = [TokenizedPair([*range(60)], [*range(40)], [*range(30, 67)])]
    expected = separate_sums(model, groups)
    torch.testing.assert_close(packed_logps(model, pack_pairs(groups)).sequences.sums, expected, rtol=1e-5, atol=0)


def test_a_window_that_cannot_be_read_is_noticed_though_the_probe_is_shorter(without_window):
    from fastdpo.modeling.attention import masks

    def unreadable(function):
        raise ValueError("another release's masks")

    without_window.setattr(masks, "limits_of", unreadable)
    check = check_packing(build("mistral", sliding_window=64))
    assert not check.ok
    assert "64" in check.reason


def test_a_head_that_is_more_than_a_linear_layer_is_refused():
    torch.manual_seed(0)
    config = CONFIG_MAPPING["roberta"](
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        is_decoder=True,
    )
    message = r"logits as its LM head times its last hidden state; RobertaForCausalLM has .*lm_head\.dense .*between"
    with pytest.raises(ValueError, match=message):
        check_packing(AutoModelForCausalLM.from_config(config))


def test_a_model_in_which_tokens_see_those_after_them_is_refused_as_an_encoder():
    config = CONFIG_MAPPING["bert-generation"](
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    with pytest.raises(ValueError, match=r"must be a causal LM, got BertGenerationDecoder.*encoder"):
        check_packing(AutoModelForCausalLM.from_config(config))


def test_a_copy_is_a_model_of_its_own_also_inside_accelerates_wrappers():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    model = prepare_model(build("llama"))
    AcceleratorState._reset_state(reset_partial_state=True)  # one precision a process, says accelerate
    Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model)
    AcceleratorState._reset_state(reset_partial_state=True)
    twin = copy.deepcopy(model)
    before = packed_logps(twin, pack_pairs(GROUPS)).chosen.detach()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(packed_logps(twin, pack_pairs(GROUPS)).chosen, before)


def test_attention_that_is_changed_after_preparing_stays_changed():
    model = prepare_model(build("llama"))
    packed_logps(model, pack_pairs(GROUPS))
    model.set_attn_implementation("sdpa")
    packed_logps(model, pack_pairs(GROUPS))
    unprepare_model(model)
    assert model.config._attn_implementation == "sdpa"


FALCON = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True}
UNPACKABLE = {"falcon": FALCON}  # which adds biases of the numbers of rows to its mask


@pytest.mark.parametrize("model_type", UNPACKABLE)
def test_the_self_check_names_a_reason_where_packing_would_leak(model_type):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**UNPACKABLE[model_type])).eval()
    check = check_packing(model)
    assert not check.ok
    assert check.reason


@pytest.mark.parametrize("model_type", UNPACKABLE)
def test_models_that_cannot_be_packed_run_padded(model_type, monkeypatch):
    monkeypatch.setitem(MODELS, model_type, UNPACKABLE[model_type])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**UNPACKABLE[model_type])).eval()
    check_packing(model)  # leaves nothing behind that padded rows could trip over
    torch.testing.assert_close(
        packed_logps(model, pad_pairs(GROUPS)).sequences.sums, separate_sums(model), rtol=1e-4, atol=1e-5
    )


def test_a_batch_is_taken_as_the_mapping_that_collators_return():
    model, batch = build("llama"), pack_pairs([TokenizedPair([1, 2, 3], [4, 5], [6])])
    with torch.no_grad():
        assert torch.equal(packed_logps(model, batch.asdict()).chosen, packed_logps(model, batch).chosen)
    with pytest.raises(ValueError, match=r"batch must be a PackedBatch or its asdict\(\), got list"):
        packed_logps(model, [batch])
    with pytest.raises(
        ValueError, match=r"batch must hold the fields of a PackedBatch, got .*'attention_mask', 'labels'"
    ):
        packed_logps(model, {"labels": batch.labels, "attention_mask": None})


@pytest.mark.parametrize(("ids", "bad"), [([4, VOCAB], VOCAB), ([4, -1], -1)])
@pytest.mark.parametrize("collate", [pack_pairs, lambda pairs: pad_pairs(pairs, pad_token_id=0)])
def test_token_ids_that_the_model_has_no_embedding_for_are_refused(ids, bad, collate):
    batch = collate([TokenizedPair([1, 2, 3], [5], [6]), TokenizedPair(ids, [5], [6])])
    with pytest.raises(ValueError, match=rf"input_ids must be in \[0, {VOCAB}\), .* got {bad}"):
        packed_logps(build("llama"), batch)
