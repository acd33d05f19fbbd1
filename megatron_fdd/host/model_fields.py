"""The fields that describe a model: what each may hold, in a config.json and among Megatron's arguments.

The bounds are far above any known model. They exist so that a wrong number is refused at once, and not after hours in
which a program builds 100 million layers.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from megatron_fdd.host.field_kinds import (
    FLAG,
    OBJECT,
    TEXT,
    ZERO_OR_ONE,
    Kind,
    above_zero,
    either,
    list_of,
    number,
    one_of,
    optional,
    shown,
    whole,
    wrong_field,
)
from megatron_fdd.host.layer_specs import NAME, OPTIONS

LAYERS = whole(1, 10_000)
WIDTH = whole(1, 1_000_000)
HEADS = whole(1, 10_000)
VOCABULARY = whole(1, 100_000_000)
POSITIONS = whole(1, 1_000_000_000)
EXPERTS = whole(1, 100_000)
MOST_EXPERTS = 1_000_000
"""The largest number of experts in all layers together."""
EPSILON = above_zero(1)
ROTARY_BASE = number(1, 10**15)
ROPE_FACTOR = number(1, 1_000_000)
PROBABILITY = number(0, 1)
DEVIATION = number(0, 1_000)
SCALE = above_zero(1_000_000)
WINDOW = whole(1, 1_000_000_000)
_ANY_NUMBER = number(-(10**9), 10**9)
_RULE = either(whole(1, 10_000), list_of(ZERO_OR_ONE))
_REACH = Kind(
    "two whole numbers of at least -1",
    lambda value: (
        isinstance(value, list | tuple) and len(value) == 2 and all(whole(-1, 10**9).fits(n) for n in value)
    ),
)

# Arguments of Megatron that shape a GPT's function, beside its weights. `load_args_from_checkpoint` of 0.19.2 knows
# about half.
ARCHITECTURE: Mapping[str, Kind] = {
    "num_layers": LAYERS,
    "hidden_size": WIDTH,
    "ffn_hidden_size": optional(WIDTH),
    "num_attention_heads": HEADS,
    "num_query_groups": optional(HEADS),
    "group_query_attention": FLAG,
    "kv_channels": optional(WIDTH),
    "position_embedding_type": one_of("learned_absolute", "rope", "yarn", "mrope", "relative", "none"),
    "rotary_base": ROTARY_BASE,
    "rotary_percent": above_zero(1),
    "rotary_interleaved": FLAG,
    "rotary_seq_len_interpolation_factor": optional(SCALE),
    "use_rope_scaling": FLAG,
    "rope_scaling_factor": ROPE_FACTOR,
    "rope_type": optional(one_of("rope", "yarn")),
    **dict.fromkeys(("rotary_scaling_factor", "mscale", "mscale_all_dim"), optional(_ANY_NUMBER)),
    "yarn_original_max_position_embeddings": optional(POSITIONS),
    **dict.fromkeys(("yarn_beta_fast", "yarn_beta_slow"), optional(_ANY_NUMBER)),
    "yarn_correction_range_round_to_int": optional(FLAG),
    "no_rope_freq": optional(either(TEXT, _RULE)),
    **dict.fromkeys(("add_bias_linear", "add_qkv_bias", "swiglu", "squared_relu", "quick_geglu"), FLAG),
    **dict.fromkeys(("bias_gelu_fusion", "untie_embeddings_and_output_weights"), FLAG),
    "normalization": one_of("LayerNorm", "RMSNorm"),
    "layernorm_epsilon": EPSILON,
    **dict.fromkeys(("layernorm_zero_centered_gamma", "qk_layernorm", "qk_l2_norm"), FLAG),
    **dict.fromkeys(
        ("apply_query_key_layer_scaling", "apply_residual_connection_post_layernorm"),
        FLAG,
    ),
    "softmax_type": one_of("vanilla", "off-by-one", "learnable"),
    "window_size": optional(_REACH),
    "window_attn_skip_freq": optional(_RULE),
    "glu_linear_offset": _ANY_NUMBER,
    "activation_func_clamp_value": optional(_ANY_NUMBER),
    "multi_latent_attention": FLAG,
    **dict.fromkeys(
        ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"),
        optional(WIDTH),
    ),
    "attention_output_gate": FLAG,
    "num_experts": optional(EXPERTS),
    "moe_layer_freq": _RULE,
    "moe_ffn_hidden_size": optional(WIDTH),
    "moe_router_topk": EXPERTS,
    "moe_router_pre_softmax": FLAG,
    "moe_router_score_function": one_of("softmax", "sigmoid", "sqrtsoftplus"),
    "moe_router_topk_scaling_factor": optional(_ANY_NUMBER),
    **dict.fromkeys(("moe_router_num_groups", "moe_router_group_topk"), optional(EXPERTS)),
    **dict.fromkeys(("moe_router_enable_expert_bias", "moe_apply_probs_on_input"), FLAG),
    **dict.fromkeys(("moe_latent_size", "moe_mlp_glu_interleave_size"), optional(WIDTH)),
    "moe_shared_expert_intermediate_size": optional(WIDTH),
    "moe_shared_expert_gate": FLAG,
    "moe_shared_expert_glu_interleave_size": optional(WIDTH),
    NAME: optional(TEXT),
    OPTIONS: optional(OBJECT),
}
# Further arguments of a checkpoint that this package reads.
_STORED: Mapping[str, Kind] = {
    **ARCHITECTURE,
    "vocab_size": optional(VOCABULARY),
    "padded_vocab_size": optional(VOCABULARY),
    "make_vocab_size_divisible_by": VOCABULARY,
    **dict.fromkeys(("max_position_embeddings", "seq_length"), optional(POSITIONS)),
    **dict.fromkeys(("attention_dropout", "hidden_dropout"), PROBABILITY),
    "init_method_std": DEVIATION,
    **dict.fromkeys(("load", "pretrained_checkpoint", "tokenizer_model", "tokenizer_type"), optional(TEXT)),
    "hybrid_layer_pattern": optional(TEXT),
}
_ALWAYS_STORED = ("num_layers", "hidden_size", "num_attention_heads")
# Lists with an entry for each layer.
_PER_LAYER = ("window_attn_skip_freq", "moe_layer_freq", "no_rope_freq")


def check_stored_args(args: object, where: str) -> argparse.Namespace:
    """Refuse stored arguments with a type or range that has no meaning; return them.

    Args:
        where: the flag and the folder of the checkpoint, for the message.

    Raises:
        ValueError: names the argument, its value and what is allowed.
    """
    if not isinstance(args, argparse.Namespace):
        raise ValueError(
            f"{where}: its arguments are {shown(args)}, not those that Megatron stores; save it again"
        )
    values = vars(args)
    odd = next((name for name in values if not isinstance(name, str)), None)
    if odd is not None:
        raise ValueError(f"{where}: stores an argument named {shown(odd)}, which is no name; save it again")
    for name in _ALWAYS_STORED:
        if name not in values:
            raise ValueError(f"{where}: stores no {name}, which every model of Megatron has; save it again")
    found = wrong_field(values, _STORED) or _wrong_list(values) or _wrong_experts(values)
    if found is not None:
        name, value, allowed = found
        raise ValueError(
            f"{where}: stores {name} = {shown(value)}, which must be {allowed}: the copy is damaged, or another "
            "program wrote it"
        )
    return args


def _wrong_list(values: Mapping[str, Any]) -> tuple[str, Any, str] | None:
    layers = values["num_layers"]
    for name in _PER_LAYER:
        value = values.get(name)
        if isinstance(value, list | tuple) and len(value) != layers:
            return name, value, f"as long as the model has layers ({layers})"
    return None


def _wrong_experts(values: Mapping[str, Any]) -> tuple[str, Any, str] | None:
    experts = values.get("num_experts")
    if experts is None:
        return None
    return wrong_experts(
        values["num_layers"],
        ("num_experts", experts),
        ("moe_router_topk", values.get("moe_router_topk", 1)),
    )


def wrong_experts(
    layers: int, experts: tuple[str, int], per_token: tuple[str, int]
) -> tuple[str, Any, str] | None:
    """Return name, value and what is allowed if experts are too many in all, or a token goes to more than there are.

    Args:
        experts, per_token: name and value of the two fields.
    """
    if experts[1] * layers > MOST_EXPERTS:
        return *experts, f"at most {MOST_EXPERTS:,} in all {layers:,} layers together"
    if per_token[1] > experts[1]:
        return *per_token, f"at most the number of experts, {experts[1]:,}"
    return None
