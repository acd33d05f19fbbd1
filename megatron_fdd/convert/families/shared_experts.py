"""Qwen1.5/2-MoE and GLM-4.5, which have an expert for every token beside those that a router chooses."""

from megatron_fdd.convert.families.decoder import decoder_family
from megatron_fdd.convert.families.decoder_shape import COMMON_DEFAULTS, NO_BIASES, Dialect
from megatron_fdd.convert.families.expert_naming import (
    DEEPSEEKS_EXPERTS,
    QWENS_LAYERS,
    QWENS_PROJECTIONS,
    ExpertNaming,
    SharedNaming,
)
from megatron_fdd.convert.families.prediction import PREDICTION_FIELDS, PREDICTION_LAYERS
from megatron_fdd.convert.families.qwen import QWEN2_DIALECT

# The load-balancing loss concerns only training.
_TRAINING = frozenset({"router_aux_loss_coef", "output_router_logits"})
QWEN2_MOE = decoder_family(
    Dialect(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        {
            **COMMON_DEFAULTS,
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "max_position_embeddings": 32768,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "norm_topk_prob": False,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
        },
        # Its rule for layers with a window is not Qwen2's: `layer_types` says which they are.
        neutral={**NO_BIASES, "qkv_bias": (True,)},
        harmless=_TRAINING | {"max_window_layers"},
        qkv_bias="always",
        window_fields=("sliding_window", "use_sliding_window", "layer_types"),
        experts=ExpertNaming(
            block="mlp",
            projections=QWENS_PROJECTIONS,
            count_fields=("num_experts", "num_local_experts"),
            width_field="moe_intermediate_size",
            layer_fields=QWENS_LAYERS,
            normalises=True,
            shared=SharedNaming(
                "shared_expert",
                width_field="shared_expert_intermediate_size",
                gate="shared_expert_gate.weight",
            ),
        ),
    ),
    dense=QWEN2_DIALECT,
    models="Qwen1.5-MoE, Qwen2-57B-A14B",
)
_GLM4_MOE = Dialect(
    "glm4_moe",
    "Glm4MoeForCausalLM",
    {
        **COMMON_DEFAULTS,
        "vocab_size": 151552,
        "hidden_size": 4096,
        "intermediate_size": 10944,
        "num_hidden_layers": 46,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "use_qk_norm": False,
        "n_routed_experts": 128,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "moe_intermediate_size": 1408,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
    },
    neutral={"mlp_bias": (False,)},
    harmless=_TRAINING | PREDICTION_FIELDS,
    left_out=PREDICTION_LAYERS,
    qkv_bias="attention_bias",
    qk_norm="use_qk_norm",
    partial_rotary=0.5,
    experts=DEEPSEEKS_EXPERTS,
)
GLM4_MOE = decoder_family(_GLM4_MOE, dense=_GLM4_MOE, models="GLM-4.5, 4.6, 4.7 and Air")
