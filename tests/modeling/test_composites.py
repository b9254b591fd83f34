"""Models that can also see: text alone through their decoder, against separate forwards of the stock model."""

import copy

import pytest
import torch
from composites import COMPOSITES, TOWERS, make_composite
from hybrids import build_tiny
from test_packed_logps import GROUPS, assert_same

from fastdpo import pack_pairs, pad_pairs
from fastdpo.modeling import check_packing
from fastdpo.modeling.backbone import backbone_name, freeze_towers, text_ids, tower_names

PACKED = [name for name in COMPOSITES if name != "qwen3_5"]  # whose linear attention mixes neighbouring tokens


@pytest.mark.parametrize("model_type", COMPOSITES)
def test_the_decoder_is_what_text_runs_through_and_the_rest_are_towers(model_type):
    model = make_composite(model_type)
    assert backbone_name(model) == ("language_model.model" if model_type == "llama4" else "model.language_model")
    assert tower_names(model) == TOWERS[model_type]
    decoder = model.get_submodule(backbone_name(model))
    trained = {id(p) for p in (*decoder.parameters(), *model.get_output_embeddings().parameters())}
    freeze_towers(model)
    assert {id(p) for p in model.parameters() if p.requires_grad} == trained


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_model_of_text_alone_has_no_towers(model_type):
    from test_packed_logps import build

    model = build(model_type)
    assert tower_names(model) == []
    assert freeze_towers(model) == []
    assert all(p.requires_grad for p in model.parameters())
    assert backbone_name(model) == {"llama": "model", "gpt2": "transformer"}[model_type]


INSIDE = {"git": ["git.image_encoder"], "phi4_multimodal": ["model.embed_tokens_extend"]}


@pytest.mark.parametrize("model_type", INSIDE)
def test_towers_in_the_decoder_itself_are_frozen_and_have_positions_of_their_own(model_type):
    from fastdpo.training.setup.models import learned_positions

    model = build_tiny(model_type)
    assert tower_names(model) == INSIDE[model_type]
    assert freeze_towers(model) == INSIDE[model_type]
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith(f"{INSIDE[model_type][0]}.")}
    assert learned_positions(model) == {"git": 256, "phi4_multimodal": None}[model_type]  # the text's
    assert check_packing(model).ok


@pytest.mark.parametrize("prefix_sharing", [True, False], ids=["shared", "unshared"])
@pytest.mark.parametrize("model_type", PACKED)
def test_packed_text_equals_separate_forwards_of_the_whole_model(model_type, prefix_sharing):
    model = make_composite(model_type)
    freeze_towers(model)
    assert check_packing(copy.deepcopy(model)).ok
    assert_same(model, pack_pairs(GROUPS, prefix_sharing=prefix_sharing))


@pytest.mark.parametrize("model_type", COMPOSITES)
def test_padded_text_equals_separate_forwards_of_the_whole_model(model_type):
    """In fp64: the recurrence of Qwen3.5's linear attention amplifies the rounding of fp32."""
    model = make_composite(model_type).double()
    freeze_towers(model)
    assert_same(model, pad_pairs(GROUPS))


@pytest.mark.parametrize("model_type", COMPOSITES)
def test_probes_hold_no_id_that_stands_for_an_image(model_type):
    ids = text_ids(make_composite(model_type)).tolist()
    assert 60 not in ids
    assert {0, 1, 2, 5, 59, 61, 66} <= set(ids)


def test_probes_end_where_a_towers_own_ids_begin():
    """Gemma 3n's towers have ids of their own from an offset on."""
    model = make_composite("gemma3")
    model.config.vision_config.vocab_offset = 40
    assert text_ids(model).tolist() == list(range(40))


@pytest.mark.parametrize("model_type", ["gemma3", "llama4"])
def test_a_copy_of_a_composite_runs_its_own_decoder(model_type):
    model = make_composite(model_type)
    expected = check_packing(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.get_submodule(backbone_name(model)).parameters():
            parameter.zero_()
    again = check_packing(twin)
    assert expected.ok
    assert again.ok, again.reason
