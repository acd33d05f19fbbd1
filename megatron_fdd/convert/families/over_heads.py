"""OLMoE and MiniMax-M2: mixtures of experts whose queries and keys are normalised over all heads at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_fdd.convert.families.decoder import decoder_family
from megatron_fdd.convert.families.decoder_shape import COMMON_DEFAULTS, NO_BIASES, Dialect
from megatron_fdd.convert.families.expert_naming import QWENS_PROJECTIONS, ExpertNaming
from megatron_fdd.convert.families.family import HfConfig
from megatron_fdd.convert.families.olmo2 import keys_of
from megatron_fdd.host.layer_specs import LayerSpec

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.training.models.gpt import GPTModelConfig

# The load-balancing loss concerns only training.
_TRAINING = frozenset({"router_aux_loss_coef", "output_router_logits"})
_NO_DENSE = (
    "no dense type normalises queries and keys over all heads, with norms in front of attention and MLP"
)


def _build(config: GPTModelConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    from megatron_fdd.host import layer_block, layer_parts

    def change(layer: ModuleSpec) -> None:
        layer.submodules.self_attention.module = layer_parts.NormOverHeadsAttention

    return layer_block.changed_block(config, vp_stage, change)


OLMOE = decoder_family(
    Dialect(
        "olmoe",
        "OlmoeForCausalLM",
        {
            **COMMON_DEFAULTS,
            "vocab_size": 50304,
            "hidden_size": 2048,
            "intermediate_size": 2048,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
        },
        neutral={**NO_BIASES, "clip_qkv": (None,)},
        harmless=_TRAINING,
        qk_norm=True,
        uncut={"hidden_size": "has as many channels of queries as hidden ones, which a cut would change"},
        experts=ExpertNaming(
            block="mlp",
            projections=QWENS_PROJECTIONS,
            count_fields=("num_experts", "num_local_experts"),
            width_field="intermediate_size",
            normalises=True,
        ),
        layer_spec=LayerSpec(_build, keys_of("olmoe")),
    ),
    dense=_NO_DENSE,
    models="OLMoE",
    limits="as `olmo2`",
)


_PARTS = ("full_attention", "linear_attention", "mlp")
# Multi-token prediction, parts that the model does not have, and code that transformers no longer needs.
_UNUSED = frozenset(
    {
        *("use_mtp", "num_mtp_modules", "mtp_transformer_layers", "auto_map", "max_model_len"),
        *("mlp_intermediate_size", "shared_moe_mode", "use_grouped_topk"),
    }
)


def _flatten(config: HfConfig) -> HfConfig:
    """Give the part of a head that turns as a factor, and leave out a list that says that all attention is softmax."""
    flat = dict(config)
    if set(config.get("attn_type_list") or ()) <= {1}:
        flat.pop("attn_type_list", None)
    turned = flat.pop("rotary_dim", None)
    if turned is not None:
        flat.setdefault("partial_rotary_factor", turned / config.get("head_dim", 128))
    return flat


MINIMAX_M2 = decoder_family(
    Dialect(
        "minimax_m2",
        "MiniMaxM2ForCausalLM",
        {
            **COMMON_DEFAULTS,
            "vocab_size": 200064,
            "hidden_size": 3072,
            "intermediate_size": 1536,
            "num_hidden_layers": 62,
            "num_attention_heads": 48,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 196608,
            "rope_theta": 5e6,
            "num_local_experts": 256,
            "num_experts_per_tok": 8,
        },
        neutral={
            **NO_BIASES,
            "router_jitter_noise": (0.0,),
            "scoring_func": ("sigmoid",),
            "use_routing_bias": (True,),
            "use_qk_norm": (True,),
            "qk_norm_type": ("per_layer",),
            "shared_intermediate_size": (0,),
            "routed_scaling_factor": (1.0,),
            "swa_rope_theta": (-1.0,),
            **dict.fromkeys(("num_expert_group", "topk_group", "attn_window_size"), (None,)),
            **dict.fromkeys((f"layernorm_{part}_beta" for part in _PARTS), (1.0,)),
        },
        harmless=_TRAINING | _UNUSED,
        qk_norm=True,
        partial_rotary=1.0,
        experts=ExpertNaming(
            block="block_sparse_moe",
            projections=("w1", "w3", "w2"),
            count_fields=("num_local_experts", "num_experts"),
            width_field="intermediate_size",
            bias="e_score_correction_bias",
        ),
        layer_spec=LayerSpec(_build, keys_of("minimax_m2")),
        flatten=_flatten,
    ),
    dense=_NO_DENSE,
    models="MiniMax-M2",
    limits="as `olmo2`",
)
