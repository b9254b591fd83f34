"""Tiny models of every architecture of transformers that mixes tokens outside attention, and what mixes in them; and of
any other, as the table of all of them has it (benchmarks/shared/tiny_models.py).
"""

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from shared.doubles import WholeDoubles
from shared.tiny_models import build_tiny, tiny_config

__all__ = ["HYBRIDS", "WholeDoubles", "build_any", "build_hybrid", "build_tiny", "tiny_config"]

SMALL = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
STATES = {"vocab_size": 67, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0, "bos_token_id": 1}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
DELTA_NET = {
    "head_dim": 8,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
MAMBA_2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}
LATENT = {"q_lora_rank": None, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
NEMOTRON_H = {
    "layers_block_type": ["mamba", "moe", "attention", "mlp"],
    "num_hidden_layers": 4,
    "head_dim": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "ssm_state_size": 8,
    "n_groups": 1,
    "chunk_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
}
CONV = {"layer_types": ["conv", "full_attention", "conv"]}
# model type -> (config, the modules that mix)
HYBRIDS = {
    "qwen3_next": (
        {**SMALL, **DELTA_NET, **EXPERTS, "shared_expert_intermediate_size": 16},
        ["model.layers.0.linear_attn", "model.layers.2.linear_attn"],
    ),
    "qwen3_5_text": ({**SMALL, **DELTA_NET}, ["model.layers.0.linear_attn", "model.layers.2.linear_attn"]),
    "olmo_hybrid": (
        {**SMALL, **DELTA_NET, "linear_num_key_heads": 4},
        ["model.layers.0.linear_attn", "model.layers.2.linear_attn"],
    ),
    "kimi_linear": (
        {
            **SMALL,
            **EXPERTS,
            **LATENT,
            "num_key_value_heads": 4,
            "num_hidden_layers": 2,
            "linear_num_heads": 4,
            "linear_head_dim": 8,
            "num_local_experts": 4,
            "layer_types": ["linear_attention", "full_attention"],
        },
        ["model.layers.0.self_attn"],
    ),
    "granitemoehybrid": (
        {
            **SMALL,
            **MAMBA_2,
            **LOCAL_EXPERTS,
            "shared_intermediate_size": 16,
            "layer_types": ["mamba", "attention", "mamba"],
        },
        ["model.layers.0.mamba", "model.layers.2.mamba"],
    ),
    "bamba": ({**SMALL, **MAMBA_2, "attn_layer_indices": [1]}, ["model.layers.0.mamba", "model.layers.2.mamba"]),
    "falcon_h1": (  # both in every layer
        {**SMALL, **MAMBA_2, "head_dim": 8, "mamba_d_ssm": 64, "num_hidden_layers": 2},
        ["model.layers.0.mamba", "model.layers.1.mamba"],
    ),
    "nemotron_h": ({**SMALL, **NEMOTRON_H}, ["model.layers.0.mixer"]),
    "lfm2": ({**SMALL, **CONV}, ["model.layers.0.conv", "model.layers.2.conv"]),
    "lfm2_moe": ({**SMALL, **CONV, **EXPERTS, "num_dense_layers": 1}, ["model.layers.0.conv", "model.layers.2.conv"]),
    "lfm3": ({**SMALL, **CONV}, ["model.layers.0.conv", "model.layers.2.conv"]),
    "mamba": ({**STATES, "state_size": 4}, ["backbone.layers.0.mixer", "backbone.layers.1.mixer"]),
    "falcon_mamba": ({**STATES, "state_size": 4}, ["backbone.layers.0.mixer", "backbone.layers.1.mixer"]),
    "mamba2": (
        {**STATES, "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 16},
        ["backbone.layers.0.mixer", "backbone.layers.1.mixer"],
    ),
    "jamba": (
        {
            **SMALL,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
        },
        ["model.layers.0.mamba", "model.layers.2.mamba"],
    ),
    "zamba2": (
        {
            **SMALL,
            "layers_block_type": ["mamba", "hybrid", "mamba"],
            "attention_head_dim": 16,
            "mamba_d_state": 8,
            "mamba_headdim": 8,
            "n_mamba_heads": 8,
            "mamba_ngroups": 1,
            "chunk_size": 16,
            "num_mem_blocks": 1,
        },
        ["model.layers.0.mamba", "model.layers.1.mamba_decoder.mamba", "model.layers.2.mamba"],
    ),
    "minimax": (
        {
            **SMALL,
            **LOCAL_EXPERTS,
            "head_dim": 8,
            "block_size": 16,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        },
        ["model.layers.0.self_attn", "model.layers.2.self_attn"],
    ),
    "recurrent_gemma": (
        {**SMALL, "lru_width": 32, "attention_window_size": 16, "head_dim": 8, "num_key_value_heads": 1},
        ["model.layers.0.temporal_block", "model.layers.1.temporal_block"],
    ),
    "rwkv": (  # of the feed-forward only the shift by a token
        {**STATES, "attention_hidden_size": 32, "context_length": 128},
        [f"rwkv.blocks.{layer}.{module}" for layer in (0, 1) for module in ("attention", "feed_forward.time_shift")],
    ),
    "xlstm": (
        {**STATES, "num_heads": 4, "num_blocks": 2, "chunk_size": 16},
        ["backbone.blocks.0.mlstm_layer", "backbone.blocks.1.mlstm_layer"],
    ),
}


def build_hybrid(model_type, spread=0.05, seed=0, **overrides):
    """Weights are spread as far as the models' own rounding allows gradients to be compared to 1e-5."""
    from releases import config_of
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = config_of(model_type)(**{**HYBRIDS[model_type][0], **overrides})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * spread)
    return model.eval()


def build_any(model_type):
    """In every process the same weights; experts are multiplied one by one, which fp64 needs."""
    if model_type in HYBRIDS:
        return build_hybrid(model_type)
    model = build_tiny(model_type)
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "_experts_implementation"):
            module.config._experts_implementation = "eager"
    return model
