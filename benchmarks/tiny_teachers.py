"""Tiny random models of the types of transformers, for the tests of the engine and for the table of types."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

WIDTH, LAYERS, VOCABULARY = 64, 4, 128
# Sizes under all names that configs have for them; a type takes the names that it knows.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "lru_width"), WIDTH),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "decoder_ffn_dim"), 96),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(
        ("head_dim", "v_head_dim", "q_lora_rank", "kv_lora_rank", "state_size", "index_head_dim"), 16
    ),
    **dict.fromkeys(("mamba_head_dim", "mamba_d_head", "mamba_d_state", "ssm_state_size"), 16),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "qk_rope_dim", "rotary_dim", "index_topk"), 8),
    **dict.fromkeys(("mamba_num_heads", "mamba_n_heads", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(
        ("num_key_value_heads", "num_experts_per_tok", "linear_num_key_heads", "mamba_expand"), 2
    ),
    **dict.fromkeys(("index_n_heads", "encoder_layers"), 2),
    **dict.fromkeys(("encoder_attention_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("n_group", "topk_group", "n_groups", "mamba_n_groups"), 1),
    **dict.fromkeys(("first_k_dense_replace", "moe_layer_freq", "bos_token_id", "decoder_start_token_id"), 1),
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "mamba_d_ssm": 128,
    "d_inner": 128,
    "sliding_window": 32,
    "attention_window_size": 32,
    "encoder_ffn_dim": 96,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "is_decoder": True,
}
# What a type refuses or needs besides.
_OWN: dict[str, dict[str, Any]] = {
    "glm4_moe_lite": {"head_dim": 8},
    # Their attention to chosen tokens reads all of a text this short: on random weights many scores are equal.
    **dict.fromkeys(
        ("axk2", "deepseek_v32", "glm_moe_dsa", "dots3_note_text"),
        {"num_key_value_heads": 4, "index_topk": 64},
    ),
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {
        "layer_types": ["full_attention"] * LAYERS,
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
    },
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25},
    "ctrl": {"dff": 96},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": WIDTH},
        "attn_config": {"kv_n_heads": 2},
    },
    "deepseek_v3": {"num_key_value_heads": 4},
    "dots1": {"n_shared_experts": 1},
    "falcon": {"new_decoder_architecture": False},
    "falcon_h1": {"lm_head_multiplier": 0.2, "embedding_multiplier": 5.0},
    "falcon_mamba": {"time_step_rank": 8},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "intermediate_size": [96] * LAYERS,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * LAYERS,
    },
    "gemma4_text": {"num_kv_shared_layers": 0, "global_head_dim": 16},
    "gpt_neo": {
        "attention_types": [[["global", "local"], 2]],
        "num_heads": 4,
        "window_size": 8,
        "intermediate_size": 96,
    },
    "granite": {
        "logits_scaling": 8.0,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.1,
    },
    "granitemoe": {"logits_scaling": 8.0, "embedding_multiplier": 12.0},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, "shared_intermediate_size": 32},
    "granitemoeshared": {"logits_scaling": 8.0},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "mamba": {"time_step_rank": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16, "expand": 2},
    "minicpm3": {"dim_model_base": 32, "scale_emb": 12, "scale_depth": 1.4},
    "mpt": {"expansion_ratio": 2},
    "nemotron": {"partial_rotary_factor": 0.5},
    "nemotron_h": {"hybrid_override_pattern": "M*-M", "layers_block_type": None, "expand": 2},
    "phi3": {"original_max_position_embeddings": 128},
    "rwkv": {"attention_hidden_size": WIDTH},
    "xlstm": {"num_blocks": LAYERS, "num_heads": 4},
    "zamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 0,
        "use_mamba_kernels": False,
        "tie_word_embeddings": False,
    },
    "zamba2": {
        "layer_types": ["hybrid", "mamba"] * 2,
        "hybrid_layer_ids": [0, 2],
        "num_mem_blocks": 1,
        "use_mamba_kernels": False,
    },
    "zaya": {"num_experts_per_tok": 1},
}
_MOST_PARAMETERS = 100e6


def tiny_config(model_type: str, **changes: Any) -> Any:
    """Return the config of a type in a small size.

    Args:
        changes: fields of the config.
    """
    kind = CONFIG_MAPPING[model_type]
    names = set(getattr(kind, "__dataclass_fields__", {})) | set(kind.__init__.__code__.co_varnames)
    names |= set(getattr(kind, "attribute_map", {}))
    fields = {name: value for name, value in _SIZES.items() if name in names}
    config = kind(**{**fields, **_OWN.get(model_type, {}), **changes})
    inner = getattr(config, "text_config", None)
    if inner is not None and inner.model_type in CONFIG_MAPPING:
        config.text_config = tiny_config(inner.model_type)
    return config


def tiny_model(model_type: str, **changes: Any) -> Any:
    """Return a random model in float32 and evaluation mode, of which no weight is trivially one or zero.

    Raises:
        ValueError: a field of the config keeps it large.
    """
    config = tiny_config(model_type, **changes)
    with torch.device("meta"):
        size = sum(tensor.numel() for tensor in AutoModelForCausalLM.from_config(config).parameters())
    if size > _MOST_PARAMETERS:
        raise ValueError(f"{size / 1e6:.0f}M parameters: the config has sizes of other names")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().float()
    for inner in (model.config, model.config.get_text_config()):
        inner.use_cache = False
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.dim() >= 2:
                tensor.mul_(2)
            elif "A_log" not in name and "dt" not in name:
                tensor.add_(0.2 * torch.randn_like(tensor))
    return model
