"""What models get that want a mask for a packed row, and what is read off the masks that they hand over."""

import copy

import pytest
import torch
from hybrids import tiny_config
from test_packed_logps import GROUPS, assert_same, gradients
from transformers import AutoModelForCausalLM
from transformers.masking_utils import (
    and_masks,
    blockwise_overlay,
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

try:
    from transformers.masking_utils import packed_sequence_compatibility_function
except ImportError:  # of 5.23 alone
    from transformers import masking_utils

    def packed_sequence_compatibility_function(inner, position_ids, sequences):
        remap = getattr(masking_utils, "remap_positions_for_packed_sequence", lambda function, positions: function)
        return and_masks(remap(inner, position_ids), masking_utils.packed_sequence_mask_function(sequences))


from fastdpo import pack_pairs, packed_logps
from fastdpo.data.batches.varlen import varlen_layout
from fastdpo.modeling import check_packing
from fastdpo.modeling.attention import PACKED_ATTENTIONS, PackedLayout, masks_of
from fastdpo.modeling.attention.masks import carried, limits_of, only_picked, packed_mask
from fastdpo.modeling.mixers import MixerRows, mixers_of
from fastdpo.modeling.mixers.adapter import run_sequences
from fastdpo.modeling.prepared import prepared_state

SMALL = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
LATENT = {
    **SMALL,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 8,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "head_dim": 4,
    "index_topk": 4,
    "index_n_heads": 16,
    "index_head_dim": 8,
}
GPT = {"vocab_size": 67, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 4}
NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}
AFMOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_shared_experts": 1}
MOSHI = {**SMALL, "ffn_dim": 48, "head_dim": 8, "sliding_window": 4}
FALCON = {"vocab_size": 67, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
NO_DROPOUT_FALCON = {"attention_dropout": 0.0, "hidden_dropout": 0.0, "alibi": False}
OF_THE_TABLE = {}  # sizes from benchmarks/shared/tiny_models.py
BLOOM = {"vocab_size": 67, "hidden_size": 32, "n_layer": 2, "n_head": 4}
# three heads are not a power of two, of which the biases have a way of their own; positions end before the row does
MPT = {"vocab_size": 67, "d_model": 24, "n_layers": 2, "n_heads": 3, "max_seq_len": 14}
TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
GIT = {**SMALL, "vision_config": {**TOWER, "image_size": 16, "patch_size": 8}, "hidden_dropout_prob": 0.0}
GIT |= {"attention_probs_dropout_prob": 0.0}
WANTED = {  # what each kind of model is given, which the self-check finds out by itself
    "llama": ("none", SMALL),
    "afmoe": ("none", {**SMALL, "sliding_window": 4, "head_dim": 8, **AFMOE}),
    "stablelm": ("token", SMALL),
    "nemotron": ("token", SMALL),
    "phimoe": ("token", {**SMALL, **MOE, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0}),
    "moshi": ("token", MOSHI),
    "gptj": ("whole", {**GPT, **NO_DROPOUT}),
    "codegen": ("whole", {**GPT, **NO_DROPOUT}),
    "falcon": ("whole", {**FALCON, **NO_DROPOUT_FALCON}),
    "doge": ("whole", {**SMALL, "keep_window_size": 6, "sliding_window": 4}),
    "deepseek_v32": ("whole", LATENT),
    "glm_moe_dsa": ("whole", LATENT),
    "bloom": ("whole", BLOOM),
    "mpt": ("whole", MPT),
    "git": ("whole", GIT),  # its masks are of blocks, of which text has none
    "inkling_text": ("sequence", OF_THE_TABLE),
    "deepseek_v4": ("sequence", OF_THE_TABLE),
}
BY_SEQUENCE = [name for name, (masks, _) in WANTED.items() if masks == "sequence"]
NONE_SINCE_5_24 = ("gptj", "codegen")  # transformers took their attention to its interface


def build(model_type, settings):
    torch.manual_seed(0)
    config = tiny_config(model_type) if settings is OF_THE_TABLE else CONFIG_MAPPING[model_type](**settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.eval()


def is_causal(model):
    ids = torch.tensor([[1, 2, 3, 4]])
    return torch.allclose(model(input_ids=ids).logits[:, :2], model(input_ids=ids[:, :2]).logits, atol=1e-4)


@pytest.mark.parametrize("model_type", WANTED)
def test_a_model_is_given_the_least_that_makes_packed_rows_exact(model_type):
    masks, settings = WANTED[model_type]
    model = build(model_type, settings)
    if model_type == "moshi" and not is_causal(model):
        pytest.skip("this release's moshi lets tokens see later ones where nobody gives it a mask")
    check = check_packing(model)
    assert check.ok, check.reason
    found = prepared_state(model).masks
    assert found == masks or (model_type in NONE_SINCE_5_24 and found == "none")
    for prefix_sharing in (True, False):
        assert_same(model, pack_pairs(GROUPS, prefix_sharing=prefix_sharing))


@pytest.mark.parametrize("model_type", ["stablelm", "gptj", "deepseek_v32", "bloom", "mpt", *BY_SEQUENCE])
def test_layers_that_run_again_in_backward_get_the_same_mask(model_type):
    model = build(model_type, WANTED[model_type][1])
    assert check_packing(model).ok
    batch = pack_pairs(GROUPS)
    expected = gradients(model, packed_logps(model, batch).sequences.sums)
    model.gradient_checkpointing_enable()
    model.train()
    for kwargs in ({"use_reentrant": False}, {"use_reentrant": True}):
        model.gradient_checkpointing_enable(kwargs)
        model.enable_input_require_grads()
        first = packed_logps(model, batch).sequences.sums
        packed_logps(model, pack_pairs(GROUPS[:2]))  # another row before the first one's backward
        actual = gradients(model, first)
        for name, grad in expected.items():
            torch.testing.assert_close(actual[name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_a_model_that_no_mask_helps_gets_none():
    """Falcon's biases are in its mask too, where no layer can be told positions."""
    model = build("falcon", {**FALCON, **NO_DROPOUT_FALCON, "alibi": True})
    check = check_packing(model)
    assert not check.ok
    assert "or the model uses row numbers as positions" in check.reason
    assert prepared_state(model).masks == "none"


@pytest.mark.parametrize("model_type", BY_SEQUENCE)
def test_attention_that_is_not_of_rows_alone_runs_by_sequence_with_the_models_own(model_type):
    model = build(model_type, OF_THE_TABLE)
    check = check_packing(model)
    assert check.ok, check.reason
    names = {name for name in mixers_of(model).names if name.endswith(".self_attn")}
    assert names == {f"model.layers.{layer}.self_attn" for layer in range(len(model.model.layers))}
    assert "Attention, over prefix and branch" in check.reason
    ids, own = torch.tensor([[5, 6, 7, 8]]), model.config._attn_implementation
    expected = model(input_ids=ids, use_cache=False).logits
    packed_logps(model, pack_pairs(GROUPS))
    torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, expected)
    assert own == "eager" == model.config._attn_implementation or own in PACKED_ATTENTIONS
    twin = copy.deepcopy(model)  # with a config of its own, which its mixers change and not the first one's
    assert_same(twin, pack_pairs(GROUPS))
    assert_same(model, pack_pairs(GROUPS))


def test_a_layer_that_attends_to_more_than_the_rows_is_named():
    check = check_packing(build("blt", OF_THE_TABLE))
    assert not check.ok
    assert "BltCrossAttention" in check.reason


def test_a_repeated_last_token_does_not_see_its_copies():
    """Sequences of 5 and 4 tokens run in one call, the shorter one with its last token twice."""
    segments = ((0, 5, 0, 0), (5, 9, 0, 0))
    varlen = varlen_layout(segments)
    row = PackedLayout(segments, varlen, masks="sequence")
    seen = []

    def layer(hidden_states, attention_mask):
        seen.append(attention_mask[:, 0] == 0)
        return hidden_states

    with masks_of(row):
        mask = packed_mask(q_length=9, kv_length=9, mask_function=causal_mask_function)
    run_sequences(layer, MixerRows(segments, varlen), (torch.randn(1, 9, 2), mask), {})
    (visible,) = seen
    assert torch.equal(visible, torch.ones(2, 5, 5, dtype=torch.bool).tril())


# Two branches of one prefix: rows 0 and 1, then 2 to 4, then 5 and 6 which go on from row 1
SEGMENTS = ((0, 5, 0, 0), (5, 7, 0, 2))
VISIBLE = """
x......
xx.....
xxx....
xxxx...
xxxxx..
xx...x.
xx...xx
"""
WINDOW_2 = """
x......
xx.....
.xx....
..xx...
...xx..
.x...x.
.....xx
"""
CHUNKS_OF_3 = """
x......
xx.....
xxx....
...x...
...xx..
xx...x.
......x
"""


def as_bool(drawn):
    return torch.tensor([[cell == "x" for cell in line] for line in drawn.split()])


def layout(masks):
    return PackedLayout(SEGMENTS, varlen_layout(SEGMENTS), masks=masks)


@pytest.mark.parametrize(
    ("function", "drawn"),
    [
        (causal_mask_function, VISIBLE),
        (sliding_window_causal_mask_function(2), WINDOW_2),
        (chunked_causal_mask_function(3, torch.zeros(1, dtype=int)), CHUNKS_OF_3),
    ],
    ids=["all", "window", "chunks"],
)
def test_a_whole_mask_is_what_the_models_own_would_be_by_sequence(function, drawn):
    with masks_of(layout("whole")):
        mask = packed_mask(q_length=7, kv_length=7, mask_function=function)
    assert mask.shape == (1, 1, 7, 7)
    assert torch.equal(mask[0, 0] == 0, as_bool(drawn))
    assert (mask[0, 0][~as_bool(drawn)] == torch.finfo(torch.float32).min).all()


def test_a_token_mask_takes_no_memory_and_carries_the_layout():
    row = layout("token")
    with masks_of(row):
        mask = packed_mask(q_length=7, kv_length=7, mask_function=sliding_window_causal_mask_function(2))
    assert mask.shape == (1, 1, 7, 7)
    assert mask.untyped_storage().nbytes() == 4
    assert mask.isnan().all()  # a layer that computes with it is found out
    assert carried(mask).layout is row
    assert (carried(mask).window, carried(mask).chunk) == (2, None)
    assert packed_mask(q_length=7, kv_length=7, mask_function=causal_mask_function) is None  # of no packed row
    assert carried(mask.detach()).layout is row
    del mask
    assert not any(carried(torch.empty(())) for _ in range(100))  # whatever memory is given out again
    assert carried(torch.zeros(1, 1, 7, 7)) is None


def test_limits_are_found_behind_what_transformers_lays_over_them():
    position_ids = torch.tensor([[0, 1, 0, 1, 2]])
    inner = sliding_window_causal_mask_function(5)
    outer = packed_sequence_compatibility_function(inner, position_ids, torch.tensor([[0, 0, 1, 1, 1]]))
    assert limits_of(outer) == {"window": 5}
    assert limits_of(causal_mask_function) == {}
    assert limits_of(chunked_causal_mask_function(7, torch.zeros(1, dtype=int))) == {"chunk": 7}


def test_masks_of_another_kind_are_refused():
    images = and_masks(causal_mask_function, blockwise_overlay(torch.zeros(1, 4)))
    with pytest.raises(ValueError, match=r"masks .*blockwise_overlay"):
        limits_of(images)
    text = and_masks(sliding_window_causal_mask_function(3), blockwise_overlay(torch.full((1, 4), -1)))
    assert limits_of(text) == {"window": 3}
    with pytest.raises(ValueError, match=r"masks .*test_masks_of_another_kind_are_refused"):
        limits_of(lambda batch, head, query, key: True)


def test_a_sparse_layer_sees_the_picked_keys_of_its_own_sequence():
    with masks_of(layout("whole")):
        mask = packed_mask(q_length=7, kv_length=7, mask_function=causal_mask_function)
    picked = torch.tensor([[[0, 6], [1, 0], [2, 0], [1, 3], [4, 2], [0, 3], [6, 1]]])
    drawn = "x...... xx..... x.x.... .x.x... ..x.x.. x...... .x....x"
    assert torch.equal(only_picked(mask, picked)[0, 0] == 0, as_bool(drawn))
    with masks_of(layout("token")), pytest.raises(ValueError, match="indices without a whole mask"):
        only_picked(packed_mask(q_length=7, kv_length=7, mask_function=causal_mask_function), picked)


def test_attention_in_chunks_is_exact():
    settings = {
        **SMALL,
        "head_dim": 8,
        "intermediate_size_mlp": 48,
        "num_local_experts": 2,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 4,
        "layer_types": ["chunked_attention", "full_attention"],
    }
    model = build("llama4_text", settings)
    check = check_packing(model)
    assert check.ok, check.reason
    assert prepared_state(model).masks == "token"
    assert_same(model, pack_pairs(GROUPS))
