"""Mixtral and Qwen3-MoE, whose MLP is a mixture of experts, in all layers or in some."""

from megatron_fdd.convert.families.decoder import decoder_family
from megatron_fdd.convert.families.decoder_shape import COMMON_DEFAULTS, NO_BIASES, Dialect
from megatron_fdd.convert.families.expert_naming import QWENS_LAYERS, QWENS_PROJECTIONS, ExpertNaming
from megatron_fdd.convert.families.mistral import MISTRAL_DIALECT
from megatron_fdd.convert.families.qwen import QWEN3_DIALECT

# The load-balancing loss concerns only training.
_TRAINING = frozenset({"router_aux_loss_coef", "output_router_logits"})
MIXTRAL = decoder_family(
    Dialect(
        "mixtral",
        "MixtralForCausalLM",
        {
            **COMMON_DEFAULTS,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096 * 32,
            "num_key_value_heads": 8,
            "rope_theta": 1e6,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        neutral={**NO_BIASES, "router_jitter_noise": (0.0,)},
        harmless=_TRAINING,
        window_fields=("sliding_window",),
        experts=ExpertNaming(
            block="block_sparse_moe",
            projections=("w1", "w3", "w2"),
            count_fields=("num_local_experts",),
            width_field="intermediate_size",
        ),
    ),
    dense=MISTRAL_DIALECT,
    models="Mixtral",
    limits="a window for some layers alone",
)
QWEN3_MOE = decoder_family(
    Dialect(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        {
            **COMMON_DEFAULTS,
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
            "moe_intermediate_size": 768,
        },
        # Megatron would also give the experts biases.
        neutral=NO_BIASES,
        # Qwen's configs carry max_window_layers; this model type has the window in all layers or in none.
        harmless=_TRAINING | {"max_window_layers"},
        qk_norm=True,
        window_fields=("sliding_window", "use_sliding_window"),
        experts=ExpertNaming(
            block="mlp",
            projections=QWENS_PROJECTIONS,
            # transformers 5 writes the second name.
            count_fields=("num_experts", "num_local_experts"),
            width_field="moe_intermediate_size",
            layer_fields=QWENS_LAYERS,
            normalises=True,
        ),
    ),
    dense=QWEN3_DIALECT,
    models="Qwen3-MoE, layers without experts among them",
    limits="a window for some layers alone",
)
