"""Layers that count rows, in packed rows: their positions are those of the sequence."""

import pytest
import torch
from test_masks import SMALL, build
from test_packed_logps import GROUPS, assert_same

from fastdpo import TokenizedPair, pack_pairs, prepare_model
from fastdpo.modeling import attention, check_packing
from fastdpo.modeling.positions import counting_tables, short_scales

BART = {
    "vocab_size": 67,
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "encoder_layers": 1,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "max_position_embeddings": 128,
    "dropout": 0.0,
    "pad_token_id": 0,
}
LLAMA4 = {
    **SMALL,
    "max_position_embeddings": 512,
    "head_dim": 8,
    "intermediate_size_mlp": 48,
    "num_local_experts": 2,
    "interleave_moe_layer_step": 2,
    "layer_types": ["full_attention"] * 4,
    "num_hidden_layers": 4,
    "no_rope_layers": [1, 0, 1, 0],
    "attn_temperature_tuning": True,
}


@pytest.mark.parametrize("model_type", ["bart", "pegasus", "marian", "mbart"])
def test_tables_that_count_rows_are_told_positions(model_type):
    model = build(model_type, BART)
    assert counting_tables(model.base_model)
    check = check_packing(model)
    assert check.ok, check.reason
    assert_same(model, pack_pairs(GROUPS))
    assert not any(table._forward_pre_hooks for table in model.modules())  # outside packed rows it counts as it did


def test_llama_4s_query_scale_follows_positions():
    """A pair of 200 tokens, of which the second branch begins behind two steps of the scale."""
    model = build("llama4_text", {**LLAMA4, "floor_scale": 64})
    generator = torch.Generator().manual_seed(0)

    def draw(length):
        return torch.randint(67, (length,), generator=generator).tolist()

    groups = [TokenizedPair(draw(60), draw(70), draw(70)), *GROUPS]
    check = check_packing(model)
    assert check.ok, check.reason
    from test_packed_logps import gradients, separate_sums

    from fastdpo import packed_logps

    expected = separate_sums(model, groups)
    actual = packed_logps(model, pack_pairs(groups)).sequences.sums
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)
    assert gradients(model, actual[: len(separate_sums(model))])


@pytest.mark.parametrize("floor_scale", [64, 8192])
def test_a_scale_that_followed_rows_would_be_seen_however_late_it_grows(floor_scale, monkeypatch):
    monkeypatch.setattr(attention, "scaled_by_position", lambda module, query, layout: query)
    check = check_packing(build("llama4_text", {**LLAMA4, "floor_scale": floor_scale}))
    assert not check.ok
    assert "packed log-probs differ" in check.reason


def test_scales_are_the_models_own_again_after_the_check():
    model = prepare_model(build("llama4_text", {**LLAMA4, "floor_scale": 64}))
    layers = [module for module in model.modules() if hasattr(module, "floor_scale")]
    with short_scales(model):
        assert {layer.floor_scale for layer in layers} == {4}
    check_packing(model)
    assert {layer.floor_scale for layer in layers} == {64}
