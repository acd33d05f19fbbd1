"""DeepSeek-V2 and V3 and what has their form (R1, Kimi-K2, Moonlight): multi-latent attention and shared experts."""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_fdd.convert.families.decoder import decoder_family
from megatron_fdd.convert.families.decoder_shape import COMMON_DEFAULTS, NO_BIASES, Dialect
from megatron_fdd.convert.families.expert_naming import DEEPSEEKS_EXPERTS
from megatron_fdd.convert.families.family import HfConfig, refuse_field
from megatron_fdd.convert.families.latent import LATENT_ROPE_KINDS, LATENT_SPEC
from megatron_fdd.convert.families.prediction import PREDICTION_FIELDS, PREDICTION_LAYERS

# The load-balancing loss, and how DeepSeek's own programs cut the experts.
_HARMLESS = frozenset(
    {"router_aux_loss_coef", "output_router_logits", "aux_loss_alpha", "seq_aux", "ep_size", "auto_map"}
)
_NEUTRAL = {**NO_BIASES, "rope_interleave": (True,), "moe_layer_freq": (1,)}
_DEFAULTS: dict[str, Any] = {**COMMON_DEFAULTS, "kv_lora_rank": 512, "q_lora_rank": 1536}
_DEFAULTS |= {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}


def _flatten_v3(config: HfConfig) -> HfConfig:
    """Refuse null where transformers computes with it."""
    for field in ("n_group", "head_dim"):
        if config.get(field, 1) is None:
            refuse_field(
                field, None, "with which transformers cannot compute; give the number, or leave it out"
            )
    return dict(config)


_V3 = Dialect(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    {
        **_DEFAULTS,
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "max_position_embeddings": 4096,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "moe_intermediate_size": 2048,
        "routed_scaling_factor": 2.5,
        "n_group": 8,
        "topk_group": 4,
        "first_k_dense_replace": 3,
        "norm_topk_prob": True,
    },
    neutral={**_NEUTRAL, "scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
    harmless=_HARMLESS | PREDICTION_FIELDS,
    left_out=PREDICTION_LAYERS,
    qk_norm=True,
    rope_kinds=LATENT_ROPE_KINDS,
    latent=True,
    uncut=dict.fromkeys(
        ("num_attention_heads", "num_query_groups"), "has latent attention, whose heads are not cut"
    ),
    experts=DEEPSEEKS_EXPERTS,
    fixed={"multi_latent_attention": True},
    layer_spec=LATENT_SPEC,
    flatten=_flatten_v3,
)
DEEPSEEK_V3 = decoder_family(_V3, dense=_V3, models="DeepSeek-V3, R1, Moonlight")
KIMI_K2 = dataclasses.replace(
    decoder_family(
        dataclasses.replace(_V3, model_type="kimi_k2"),
        dense="transformers has no such type to run: say `deepseek_v3` in config.json, without `auto_map`",
        models="Kimi-K2",
        limits="transformers has no such type, so that nothing here runs it with transformers: say `deepseek_v3` in "
        "config.json, without `auto_map`",
    ),
    same_as=DEEPSEEK_V3.model_type,
)


def _flatten_v2(config: HfConfig) -> HfConfig:
    """Refuse the routing of the large V2."""
    if config.get("topk_method") == "group_limited_greedy":
        refuse_field(
            "topk_method",
            "group_limited_greedy",
            "which scores a group of experts by its best one, where Megatron's router adds up its best; as a teacher "
            "it runs with fdd teach --engine transformers",
        )
    return dict(config)


_V2 = dataclasses.replace(
    _V3,
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    defaults={
        **_DEFAULTS,
        "vocab_size": 102400,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "moe_intermediate_size": 1407,
        "routed_scaling_factor": 1.0,
        "n_group": None,
        "topk_group": None,
        "first_k_dense_replace": 0,
        "norm_topk_prob": False,
    },
    # transformers does not look at norm_topk_prob, and with the greedy choice not at groups.
    neutral={
        **_NEUTRAL,
        "scoring_func": ("softmax",),
        "topk_method": ("greedy", None),
        "norm_topk_prob": (False,),
        "n_group": (1, None),
    },
    experts=dataclasses.replace(
        DEEPSEEKS_EXPERTS,
        bias=None,
        count_fields=("n_routed_experts", "num_experts", "num_local_experts"),
    ),
    flatten=_flatten_v2,
)
DEEPSEEK_V2 = decoder_family(
    _V2,
    dense=_V2,
    models="DeepSeek-V2-Lite",
    limits="group-limited routing (the large V2): it scores a group by its best expert, Megatron by a sum",
)
