"""Layers that count rows, in packed rows: their positions are those of the sequence."""

import pytest
import torch
from test_masks import SMALL, WANTED, build
from test_packed_logps import GROUPS, assert_same

from fastdpo import TokenizedPair, pack_pairs, prepare_model
from fastdpo.modeling import attention, check_packing, self_check
from fastdpo.modeling.positions import counting_tables, layers_with_counting_biases, short_scales, told_positions
from fastdpo.modeling.prepared import prepared_state

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


@pytest.mark.parametrize("model_type", ["bloom", "mpt"])
def test_linear_biases_are_those_of_positions(model_type):
    model = build(model_type, WANTED[model_type][1])
    layers = layers_with_counting_biases(model.base_model)
    assert layers == [f"{'h' if model_type == 'bloom' else 'blocks'}.{layer}" for layer in range(2)]
    batch = pack_pairs(GROUPS)
    assert batch.input_ids.shape[1] > 14  # MPT's table of biases is shorter than the row
    check = check_packing(model)
    assert check.ok, check.reason
    assert_same(model, batch)
    assert not any(module._forward_pre_hooks for module in model.modules())
    ids = torch.tensor([[5, 6, 7, 8, 9]])  # and outside packed rows the biases are the model's own
    logits = model(input_ids=ids).logits
    torch.testing.assert_close(logits, build(model_type, WANTED[model_type][1])(input_ids=ids).logits)


def test_a_bias_is_moved_to_its_columns_once_however_many_layers_take_it():
    class Layer(torch.nn.Module):
        def forward(self, hidden_states, alibi):
            return hidden_states + alibi[0, 0]

    layers = torch.nn.ModuleList([Layer(), Layer()])
    bias, rows = torch.tensor([[[0.0, 1.0, 2.0, 3.0]]]), torch.zeros(4)
    with told_positions(layers, ["0", "1"], torch.tensor([[0, 1, 1, 2]])):
        for layer in layers:
            rows = layer(rows, alibi=bias)
    assert rows.tolist() == [0.0, 2.0, 2.0, 4.0]
    per_query = torch.zeros(1, 4, 4)  # not a bias that counts
    with told_positions(layers, ["0"], torch.tensor([[0, 1, 1, 2]])):
        layers[0](torch.zeros(4), alibi=per_query)
    assert per_query.shape == (1, 4, 4)


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
    model = build("llama4_text", {**LLAMA4, "floor_scale": floor_scale})
    assert check_packing(model).ok
    assert prepared_state(model).masks == "sequence"  # where rows are positions
    monkeypatch.setattr(self_check, "MASKS", ("none", "token", "whole"))
    check = check_packing(model)
    assert not check.ok
    assert "packed log-probs differ" in check.reason


def test_scales_are_the_models_own_again_after_the_check():
    model = prepare_model(build("llama4_text", {**LLAMA4, "floor_scale": 64}))
    layers = [module for module in model.modules() if hasattr(module, "floor_scale")]
    with short_scales(model):
        assert {layer.floor_scale for layer in layers} == {4}
    check_packing(model)
    assert {layer.floor_scale for layer in layers} == {64}
