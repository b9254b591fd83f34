"""A dry run of a few layers gives the bytes of all of them, to the byte."""

from functools import partial

import pytest
import torch
from peft import LoraConfig
from releases import needs_activation_checkpointing
from tiny import make_llama
from torch import nn
from transformers import AutoConfig

from fastdpo.training.memory import dry_model
from fastdpo.training.memory.card.estimates import pair_shape
from fastdpo.training.memory.dry_model import DryModel
from fastdpo.training.memory.dry_run import assume_tiles, dry_step, fake_mode, shape_only
from fastdpo.training.memory.estimate import enable_checkpointing
from fastdpo.training.memory.folding import NotPeriodic, find_fold
from fastdpo.training.memory.weightless import weightless_model
from fastdpo.training.setup.optimizers import update_bytes

SHAPE = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
DELTA = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
CONFIGS = {
    "llama": ("llama", {"num_hidden_layers": 9}),
    "tied": ("qwen3", {"num_hidden_layers": 9, "tie_word_embeddings": True}),
    "sliding": ("gemma3_text", {"num_hidden_layers": 26, "sliding_window": 16}),
    "experts": ("qwen3_moe", {"num_hidden_layers": 9, **MOE}),
    "dense-first": ("qwen3_moe", {"num_hidden_layers": 9, **MOE, "mlp_only_layers": [0, 1]}),
    "hybrid": ("qwen3_next", {"num_hidden_layers": 20, **MOE, **DELTA, "shared_expert_intermediate_size": 32}),
}


def make_config(name):
    kind, settings = CONFIGS[name]
    return AutoConfig.for_model(kind, **SHAPE, **settings)


def make_model(name, method):
    lora = None if method != "lora" else LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = weightless_model(make_config(name), torch.float32 if method == "full" else torch.bfloat16, lora)
    if lora is not None:
        model.enable_input_require_grads()
    return model


def folded_and_whole(model, tokens, *, checkpointing=False, tiles=False, offload=False, every=1, **settings):
    """The peak by a fold that was found and did not fail, and the peak of all layers."""
    mode = fake_mode()

    def prepare(dry):
        assert not tiles or assume_tiles(dry, mode, 16, torch.bfloat16)
        if checkpointing:
            enable_checkpointing(dry, {"offload": offload, **({"every_n_layers": every} if every > 1 else {})})

    settings = {"autocast": torch.bfloat16, "workspace_bytes": 2**18, "accumulates": True, **settings}
    settings |= {"impl": "tiled", "varlen": True}
    fold, whole = find_fold(model, offload, every), shape_only(model, mode)
    folded = shape_only(model, mode, fold)
    for dry in (folded, whole):
        prepare(dry)
    row = pair_shape(tokens)
    return dry_step(folded, row, mode, fold=fold, **settings), dry_step(whole, row, mode, **settings)


@pytest.mark.parametrize(
    ("method", "settings"), [("lora", {}), ("full", {"checkpointing": True, "accumulates": False})]
)
def test_four_layers_give_the_peak_of_nine(method, settings):
    model = make_model("llama", method)
    assert find_fold(model).num_layers == 4
    folded, whole = folded_and_whole(model, 256, **settings)
    assert folded == whole


@needs_activation_checkpointing
def test_seven_layers_of_which_every_second_is_checkpointed_give_the_peak_of_nine():
    model = make_model("llama", "lora")
    fold = find_fold(model, every_n_layers=2)
    assert (fold.num_layers, fold.period, fold.times) == (7, 2, 1)
    folded, whole = folded_and_whole(model, 256, checkpointing=True, every=2)
    assert folded == whole


WAYS = {
    "kept": {},
    "first micro-batch": {"accumulates": False},
    "fp32": {"autocast": None},
    "checkpoints": {"checkpointing": True},
    "every second layer": {"checkpointing": True, "every": 2},
    "tiles": {"checkpointing": True, "tiles": True},
    "offload": {"checkpointing": True, "offload": True},
    "tiles and offload": {"checkpointing": True, "tiles": True, "offload": True},
    "in backward": {
        "checkpointing": True,
        "accumulates": False,
        "update_bytes": partial(update_bytes, "adamw_bnb_8bit", weight_rounding="nearest"),
    },
    "evaluation": {"with_grad": False},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=needs_activation_checkpointing if "every" in WAYS[way] else ()) for way in WAYS]
)
@pytest.mark.parametrize("method", ["full", "bf16", "lora"])
@pytest.mark.parametrize("name", ["llama", "tied", "experts", "dense-first", "sliding"])
def test_the_peak_of_all_layers_is_that_of_the_first_ones_and_their_repetitions(name, method, way):
    model = make_model(name, method)
    for tokens in (64, 1536):
        folded, whole = folded_and_whole(model, tokens, **WAYS[way])
        assert folded == whole


def test_experts_in_fp32_run_in_tiles():
    mode = fake_mode()
    assert assume_tiles(shape_only(make_model("experts", "full"), mode), mode, 16, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["kept", "checkpoints"])
def test_recurrent_layers_are_extrapolated_from_as_many_tokens_with_a_fold(way):
    model = make_model("hybrid", "full")
    assert find_fold(model).period == 4
    folded, whole = folded_and_whole(model, 256, **WAYS[way])
    assert folded == whole


def test_a_fold_has_the_first_layers_and_whole_periods_are_left_out():
    def found(name, **settings):
        fold = find_fold(make_model(name, "full"), **settings)
        return fold.num_layers, fold.period, fold.times

    assert found("llama") == (4, 1, 5)
    assert found("llama", offload=True) == (6, 1, 3)
    assert found("dense-first") == (6, 1, 3)  # two dense layers, and four with experts
    assert found("sliding") == (20, 6, 1)
    assert found("hybrid") == (16, 4, 1)


def test_models_with_few_layers_or_no_pattern_have_no_fold():
    assert find_fold(make_llama(num_hidden_layers=4)) is None
    uneven = make_llama(num_hidden_layers=9)
    for number, layer in enumerate(uneven.model.layers):
        layer.mlp = nn.Linear(32, 32, bias=number in (1, 4, 5, 8))
    assert find_fold(uneven) is None


def test_layers_that_do_not_repeat_their_allocations_run_whole(monkeypatch):
    steps = []

    def step(model, row, mode, *, fold=None, **settings):
        steps.append((len(model.model.layers), fold is not None))
        if fold is not None:
            raise NotPeriodic
        return "whole"

    monkeypatch.setattr(dry_model, "dry_step", step)
    dry = DryModel(make_llama(num_hidden_layers=9), fake_mode())
    assert [dry.step(pair_shape(64)) for _ in range(2)] == ["whole"] * 2
    assert steps == [(4, True), (9, False), (9, False)]  # it does not try again
