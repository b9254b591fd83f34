"""Liger's layer kernels behind transformers' switch: they go into the layers, and leave the head op its place."""

import copy
from types import SimpleNamespace

import pytest
import torch
from tiny import make_llama
from transformers.models.llama import modeling_llama

from fastdpo import DPOConfig, prepare_model
from fastdpo.training.setup.layer_kernels import use_layer_kernels

pytest.importorskip("liger_kernel")


@pytest.fixture(autouse=True)
def _other_models_stay_as_they_are(monkeypatch):
    """Liger replaces names of the module too."""
    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))


def arguments(device="cuda", config=None):
    return SimpleNamespace(use_liger_kernel=True, device=torch.device(device), liger_kernel_config=config)


def test_norms_and_mlps_are_replaced_and_the_packed_forward_is_not():
    model, args = make_llama(), arguments(config={"rope": False})
    forwards = {name: module.forward for name, module in model.named_modules()}
    for _ in range(2):  # before the model is prepared, and again by Trainer
        use_layer_kernels(model, args)
        prepare_model(model)
    assert args.liger_kernel_config == {"rope": False, "cross_entropy": False, "fused_linear_cross_entropy": False}
    layer = model.model.layers[0]
    for module in (layer.input_layernorm, layer.mlp, model.model.norm):
        assert "liger" in module.forward.__func__.__module__
    assert layer.self_attn.forward == forwards["model.layers.0.self_attn"]
    assert "liger" not in model.forward.__func__.__module__
    twin = copy.deepcopy(model)
    assert twin.model.norm.forward.__self__ is twin.model.norm  # a frozen reference keeps the kernels


@pytest.mark.parametrize("part", ["cross_entropy", "fused_linear_cross_entropy"])
def test_a_part_that_would_replace_the_head_op_is_refused(part):
    with pytest.raises(ValueError, match=f"liger_kernel_config must not set {part}"):
        use_layer_kernels(make_llama(), arguments(config={part: True}))


def test_a_cpu_is_refused(tmp_path):
    args = DPOConfig(str(tmp_path), use_cpu=True, use_liger_kernel=True)
    with pytest.raises(ValueError, match="use_liger_kernel must be False on a CPU"):
        use_layer_kernels(make_llama(), args)
    use_layer_kernels(make_llama(), DPOConfig(str(tmp_path), use_cpu=True))
