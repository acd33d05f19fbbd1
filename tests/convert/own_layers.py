"""Tiny models of the families whose layers are not Megatron's own, by what differs from `toys.SHAPE`."""

from __future__ import annotations

import math
from typing import Any

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# The texts are longer than the context before scaling.
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
VARIANTS: dict[str, dict[str, Any]] = {
    "granite": {
        "model_type": "granite",
        "architectures": ["GraniteForCausalLM"],
        "embedding_multiplier": 12,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.22,
        "logits_scaling": 3.0,
    },
    "glm4": {
        "model_type": "glm4",
        "architectures": ["Glm4ForCausalLM"],
        "pad_token_id": 0,
        "attention_bias": True,
        "partial_rotary_factor": 0.6,
    },
    "exaone4": {
        "model_type": "exaone4",
        "architectures": ["Exaone4ForCausalLM"],
        "rope_scaling": {**LLAMA3_SCALING, "factor": 16.0},
        "sliding_window": 7,
        "sliding_window_pattern": "LLLG",
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "olmoe": {
        "model_type": "olmoe",
        "architectures": ["OlmoeForCausalLM"],
        "head_dim": 4,  # its norms assume that heads share the hidden size
        "pad_token_id": 0,
        "intermediate_size": 24,
        "num_experts": 6,
        "num_experts_per_tok": 3,
    },
    "minimax_m2": {
        "model_type": "minimax_m2",
        "architectures": ["MiniMaxM2ForCausalLM"],
        "rotary_dim": 6,
        "intermediate_size": 64,
        "num_local_experts": 6,
        "num_experts_per_tok": 3,
        "torch_dtype": "bfloat16",
    },
}
# Both caps bend most of what they cap.
VARIANTS["gemma2"] = {
    "model_type": "gemma2",
    "architectures": ["Gemma2ForCausalLM"],
    "tie_word_embeddings": True,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 13,
    "sliding_window": 7,
    "attn_logit_softcapping": 1.5,
    "final_logit_softcapping": 2.0,
    "cache_implementation": "hybrid",
}
VARIANTS |= {
    # YaRN on the layer without a window alone.
    "olmo3": {
        "model_type": "olmo3",
        "architectures": ["Olmo3ForCausalLM"],
        "pad_token_id": 0,
        "sliding_window": 7,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "rope_scaling": {**YARN, "attention_factor": 0.1 * math.log(4.0) + 1.0},
    },
    "hunyuan_v1_dense": {
        "model_type": "hunyuan_v1_dense",
        "architectures": ["HunYuanDenseV1ForCausalLM"],
        "use_qk_norm": True,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0, "beta_fast": 32, "mscale": 1.0},
    },
}
VARIANTS |= {
    "granitemoe": {
        **{key: value for key, value in VARIANTS["granite"].items() if key != "architectures"},
        "model_type": "granitemoe",
        "architectures": ["GraniteMoeForCausalLM"],
        "head_dim": 4,
        "intermediate_size": 24,
        "num_local_experts": 6,
        "num_experts_per_tok": 3,
    },
    "ernie4_5_moe": {
        "model_type": "ernie4_5_moe",
        "architectures": ["Ernie4_5_MoeForCausalLM"],
        "moe_intermediate_size": 24,
        "moe_num_experts": 6,
        "moe_k": 3,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 2,
        "use_bias": False,
    },
    "llama4_text": {
        "model_type": "llama4_text",
        "architectures": ["Llama4ForCausalLM"],
        "use_qk_norm": False,
        "intermediate_size": 24,
        "intermediate_size_mlp": 66,
        "num_local_experts": 6,
        "interleave_moe_layer_step": 2,
        "no_rope_layers": [1, 1, 0],
        "attn_temperature_tuning": True,
    },
    "cohere2": {
        "model_type": "cohere2",
        "architectures": ["Cohere2ForCausalLM"],
        "head_dim": 4,
        "layer_norm_eps": 3e-4,
        "rms_norm_eps": ...,
        "logit_scale": 0.3,
        "sliding_window": 7,
        "sliding_window_pattern": 3,
        "use_gated_activation": True,
    },
    # Its texts are as long as its layers can process.
    "ministral3": {
        "model_type": "ministral3",
        "architectures": ["Ministral3ForCausalLM"],
        "pad_token_id": 0,
        "rope_theta": ...,
        "rope_parameters": {
            **YARN,
            "type": "yarn",
            "rope_theta": 1000000.0,
            "original_max_position_embeddings": 40,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    },
}
