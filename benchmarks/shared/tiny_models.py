"""A tiny random model of any causal LM in transformers: a model type in, the model out.

Sizes are given by the names of config fields, where a config has them; two layers of every kind that the type has;
experts, latent attention, linear attention and sliding windows stay on. What a type needs beyond that stands in EXTRA.
"""

from __future__ import annotations

from typing import Any

import torch

VOCAB = 96
SEVERAL = 2  # layers of every kind
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size", "embedding_dim", "emb_dim"), 32),
    **dict.fromkeys(("word_embed_proj_dim", "input_embedding_size", "output_embedding_size", "lru_width"), 32),
    **dict.fromkeys(("attention_hidden_size", "decoder_hidden_size"), 32),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "dim_ff", "dff", "d_inner", "n_inner", "intermediate_size_mlp"), 48
    ),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "ffn_hidden_size", "expert_ffn_hidden_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "dense_intermediate_size"), 16),
    **dict.fromkeys(("shared_experts_intermediate_size", "shared_intermediate_size", "feed_forward_size"), 16),
    **dict.fromkeys(("moe_shared_expert_intermediate_size",), 16),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "num_query_groups"), 2),
    **dict.fromkeys(("head_dim", "v_head_dim", "qk_nope_head_dim", "global_head_dim", "swa_head_dim", "d_head"), 8),
    **dict.fromkeys(("attention_head_size", "dim_head", "kv_channels"), 8),
    "qk_rope_head_dim": 4,
    "qk_head_dim": 12,
    "kv_lora_rank": 8,
    "q_lora_rank": 16,
    "o_lora_rank": 8,
    "o_groups": 2,
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "n_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("moe_num_shared_experts", "first_k_dense_replace", "num_dense_layers", "zero_expert_num"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions"), 256),
    **dict.fromkeys(("model_max_length", "context_length"), 256),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_window_size", "window_size"), 8),
    **dict.fromkeys(("local_attention", "keep_window_size"), 16),
    "query_pre_attn_scalar": 8,
    "index_head_dim": 8,
    "index_n_heads": 16,  # the scores of few heads are often 0 for several keys, of which any may be picked
    "index_topk": 4,
    "index_topk_blocks": 2,
    "index_block_size": 4,
    "rotary_dim": 4,
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads", "n_mamba_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 8),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 16),
    **dict.fromkeys(("n_groups", "mamba_n_groups", "mamba_ngroups"), 1),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 8),
    "mamba_d_ssm": 64,
    **dict.fromkeys(("mamba_dt_rank", "time_step_rank"), 4),
    "attention_chunk_size": 16,
    "floor_scale": 16,
    **dict.fromkeys(("vocab_size_per_layer_input", "unpadded_vocab_size"), VOCAB),
    "hidden_size_per_layer_input": 8,
    "altup_num_inputs": 2,
    "laurel_rank": 4,
    "activation_sparsity_pattern": None,
    "num_kv_shared_layers": 0,
    "router_hidden_size": 16,
    "hc_mult": 2,
    "hc_count": 2,
    "hc_lowrank": 8,
    "block_multiple_of": 16,
    "adapter_rank": 4,
    "gated_norm_rank": 4,
    **dict.fromkeys(("type_vocab_size",), 2),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {"head_dim": 4, "num_key_value_heads": 4}
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers", "num_blocks")
LAYERS = (*LAYERS, "num_decoder_layers", "num_encoder_layers")
KINDS = ("layer_types", "layers_block_type", "block_types", "attn_layers")
DROPOUTS = ("dropout", "layerdrop", "drop_rate", "_pdrop", "dropout_prob", "mask_time_prob")
SMALL_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SMALL_VISION = {**SMALL_VISION, "image_size": 16, "patch_size": 8}
_LATENT_LAYER = {
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "qk_rope_head_dim"), 4),
    **dict.fromkeys(("qk_nope_head_dim", "v_head_dim", "kv_lora_rank"), 8),
    "q_lora_rank": 16,
    "head_dim": 12,
}
_BLT = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 48}
EXTRA: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3], "num_hidden_layers": 4},
    "blt": {
        "patch_in_forward": False,
        "encoder_hash_byte_group_vocab": 64,
        "patcher_config": _BLT,
        "encoder_config": {**_BLT, "hidden_size_global": 32},
        "decoder_config": {**_BLT, "hidden_size_global": 32},
        "global_config": _BLT,
    },
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "num_hidden_layers": 4,
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots3_note": {
        "vision_config": {
            **SMALL_VISION,
            "adapter_in_dim": 16,
            "adapter_out_dim": 32,
            "mlp_layer_types": ["dense"],
            "per_layer_config": {},
        },
        "audio_config": {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "adapter_input_size": 16,
            "adapter_out_dim": 32,
        },
    },
    "gemma3": {"vision_config": SMALL_VISION, "mm_tokens_per_image": 4, "image_token_index": 90},
    "gemma4": {
        "vision_config": {**SMALL_VISION, "head_dim": 8, "num_key_value_heads": 2, "global_head_dim": 8},
        "image_token_id": 90,
    },
    "gemma3n": {
        "text_config": {"vocab_size_per_layer_input": VOCAB},
        "vision_config": {"vocab_offset": VOCAB},
        "audio_config": {
            "vocab_offset": VOCAB,
            "hidden_size": 16,
            "conf_num_attention_heads": 2,
            "conf_num_hidden_layers": 1,
            "sscp_conv_channel_size": [8, 8],
        },
    },
    "git": {"vision_config": SMALL_VISION},
    "got_ocr2": {
        "vision_config": {
            **SMALL_VISION,
            "output_channels": 8,
            "mlp_dim": 16,
            "window_size": 2,
            "global_attn_indexes": [0],
        },
        "image_token_index": 90,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4, "num_hidden_layers": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_hidden_layers": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4},
    "llama4": {
        "vision_config": {
            **SMALL_VISION,
            "projector_input_dim": 16,
            "projector_output_dim": 16,
            "vision_output_dim": 16,
            "pixel_shuffle_ratio": 0.5,
        },
        "image_token_index": 90,
    },
    "mamba2": {"head_dim": 16},
    "moss_transcribe_diarize": {
        "audio_config": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        "audio_token_id": 90,
    },
    "phi4_multimodal": {
        "vision_config": {**SMALL_VISION, "crop_size": 16, "image_token_id": 90},
        "audio_config": {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_blocks": 1,
            "num_attention_heads": 2,
            "ext_pw_out_channel": 16,
            "depthwise_separable_out_channel": 16,
            "nemo_conv_channels": 16,
            "audio_token_id": 91,
        },
    },
    "recurrent_gemma": {"num_hidden_layers": 6},
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [16, 16],
        "axial_pos_embds_dim": [16, 16],
        "local_attn_chunk_length": 16,
        "lsh_attn_chunk_length": 16,
        "num_buckets": 4,
    },
    "roc_bert": {
        "pronunciation_vocab_size": 9,
        "shape_vocab_size": 9,
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_key_value_heads": 4, "attention_hidden_size": 64, "attention_head_dim": 16, "head_dim": 16},
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_key_value_heads": 4,
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "head_dim": 16,
    },
    "zaya": {"num_experts_per_tok": 1, "sliding_window": 8},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
}


EXTRA["dots3_note_text"] = {"per_layer_config": {layer: {**_LATENT_LAYER} for layer in (1, 3)}}
EXTRA["dots3_note"]["text_config"] = EXTRA["dots3_note_text"]
_ASSISTANT = {"hidden_size": 32, "num_hidden_layers": 4, "num_kv_shared_layers": 4}
_ASSISTANT = {**_ASSISTANT, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
EXTRA |= {name: {"text_config": _ASSISTANT} for name in ("gemma4_assistant", "gemma4_unified_assistant")}
EXTRA["qwen4_exp"] = {"text_config": EXTRA["qwen4_exp_text"], "image_token_id": 90}


def tiny_config(model_type: str) -> Any:
    """Raises whatever the config's class makes of such sizes."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[model_type]
    extra = EXTRA.get(model_type, {})
    try:
        default = config_class()
    except Exception:  # some have no sound defaults
        return config_class(**{**SIZES, "num_hidden_layers": SEVERAL, **extra})
    text = default.get_text_config() if "text_config" in config_class.sub_configs else default
    settings = _settings(text)
    if text is default:
        return config_class(**{**settings, **extra})
    return config_class(**{**extra, "text_config": {**settings, **extra.get("text_config", {})}})


def _settings(default: Any) -> dict[str, Any]:
    """SIZES as far as a config has such fields, and its layers."""
    known = {**vars(default), **dict.fromkeys(default.attribute_map or ())}
    settings = {name: value for name, value in SIZES.items() if name in known}
    if "qk_rope_head_dim" in known:  # latent attention: one head dim for what is rotated, keys for every head
        settings |= {name: value for name, value in LATENT.items() if name in known}
    kinds = next((field for field in KINDS if getattr(default, field, None)), None)
    each = list(dict.fromkeys(getattr(default, kinds))) if kinds else [None]
    num_layers = SEVERAL * len(each)
    settings |= {name: num_layers for name in LAYERS if name in known}
    if kinds and not isinstance(
        getattr(type(default), (default.attribute_map or {}).get(kinds, kinds), None), property
    ):
        settings[kinds] = each * SEVERAL
    if "rotary_pct" not in known and isinstance(getattr(default, "rope_parameters", None), dict):
        settings |= _short_rope(default.rope_parameters)
    for name, value in vars(default).items():
        if isinstance(value, float) and value > 0 and any(part in name for part in DROPOUTS):
            settings[name] = 0.0
    return settings


def _short_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Sections of rotary positions that are as long as such heads."""
    if "mrope_section" in rope:
        return {"rope_parameters": {**rope, "mrope_section": [1, 1, 2]}}
    return {}


def build_tiny(model_type: str, dtype: torch.dtype = torch.float32, spread: float = 0.15) -> Any:
    """The model, in eval mode, with weights spread so that logits and leaks are of size 1."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = tiny_config(model_type)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * spread)
    return model.to(dtype).eval()
