"""Rules that all families share: what fields of config.json may hold, and Megatron args that no family sets."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from megatron_fdd.convert.families.family import refuse_field
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
    whole,
    wrong_field,
)
from megatron_fdd.host.model_fields import (
    DEVIATION,
    EPSILON,
    EXPERTS,
    HEADS,
    LAYERS,
    POSITIONS,
    PROBABILITY,
    ROPE_FACTOR,
    ROTARY_BASE,
    SCALE,
    VOCABULARY,
    WIDTH,
    wrong_experts,
)

# Fields that do not change a model's function.
_HARMLESS = {
    "model_type", "architectures", "dtype", "torch_dtype", "transformers_version", "transformers.js_config",
    "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "_name_or_path", "id2label",
    "label2id", "num_labels", "_num_labels", "return_dict", "output_attentions", "output_hidden_states",
    "problem_type", "unsloth_version", "unsloth_fixed", "_attn_implementation_autoset", "is_decoder",
    "task_specific_params", "gradient_checkpointing",
}  # fmt: skip
# Fields that can change the function, each with the values at which it does not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "chunk_size_feed_forward": (0,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({}, None),
}
# Old configs say -1 where a tokenizer has no such token.
_ID = whole(-1, 100_000_000)
TOKEN_IDS: Mapping[str, Kind] = dict.fromkeys(
    ("bos_token_id", "eos_token_id", "pad_token_id"), optional(either(_ID, list_of(_ID)))
)
"""What the ids of tokens may be, in config.json and generation_config.json."""
# What a field may hold, for all families together. Fields of a family outside of this package have no kind here.
_KINDS: dict[str, Kind] = {
    **dict.fromkeys(("num_hidden_layers", "n_layer"), LAYERS),
    **dict.fromkeys(("hidden_size", "n_embd", "intermediate_size", "moe_intermediate_size"), WIDTH),
    **dict.fromkeys(("head_dim", "n_inner"), optional(WIDTH)),
    **dict.fromkeys(("num_attention_heads", "n_head"), HEADS),
    "num_key_value_heads": optional(HEADS),
    **dict.fromkeys(("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), WIDTH),
    **dict.fromkeys(("q_lora_rank", "qk_head_dim"), optional(WIDTH)),
    "vocab_size": VOCABULARY,
    **dict.fromkeys(("max_position_embeddings", "n_positions"), POSITIONS),
    "n_ctx": optional(POSITIONS),
    **dict.fromkeys(
        ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_eps", "norm_epsilon"), EPSILON
    ),
    **dict.fromkeys(
        ("attention_bias", "mlp_bias", "tie_word_embeddings", "norm_topk_prob", "use_qk_norm", "use_bias"),
        FLAG,
    ),
    "use_sliding_window": optional(FLAG),
    **dict.fromkeys(("attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"), PROBABILITY),
    "initializer_range": DEVIATION,
    **dict.fromkeys(("rope_theta", "rope_local_base_freq"), ROTARY_BASE),
    **dict.fromkeys(("rope_scaling", "rope_parameters"), optional(OBJECT)),
    "query_pre_attn_scalar": SCALE,
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), optional(SCALE)),
    **dict.fromkeys(("embedding_multiplier", "attention_multiplier", "residual_multiplier"), SCALE),
    **dict.fromkeys(("logits_scaling", "logit_scale"), SCALE),
    **dict.fromkeys(("rotary_dim", "intermediate_size_mlp"), optional(WIDTH)),
    "moe_layers": optional(list_of(whole(0, 10_000))),
    "interleave_moe_layer_step": LAYERS,
    "floor_scale": POSITIONS,
    "attention_chunk_size": optional(POSITIONS),
    "attn_type_list": optional(list_of(ZERO_OR_ONE)),
    "sliding_window": optional(whole(0, 1_000_000_000)),  # whether 0 may stand there, `read_windows` knows
    "sliding_window_pattern": optional(either(LAYERS, TEXT)),
    "max_window_layers": optional(whole(0, 10_000)),
    "layer_types": optional(list_of(TEXT)),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), optional(EXPERTS)
    ),
    **dict.fromkeys(("num_nextn_predict_layers", "num_mtp_layers"), optional(whole(0, 1_000))),
    **dict.fromkeys(("n_group", "topk_group"), optional(EXPERTS)),
    **dict.fromkeys(
        ("n_shared_experts", "moe_num_shared_experts", "first_k_dense_replace"), whole(0, 10_000)
    ),
    "shared_expert_intermediate_size": WIDTH,
    "routed_scaling_factor": SCALE,
    "no_rope_layers": optional(list_of(ZERO_OR_ONE)),
    "no_rope_layer_interval": LAYERS,
    "partial_rotary_factor": optional(above_zero(1)),
    **dict.fromkeys(("num_experts_per_tok", "moe_k"), EXPERTS),
    "decoder_sparse_step": optional(LAYERS),
    "mlp_only_layers": optional(list_of(whole(0, 10_000))),
    "cache_implementation": optional(TEXT),
    "auto_map": OBJECT,
    **dict.fromkeys(("activation_function", "hidden_act", "hidden_activation"), optional(TEXT)),
    **dict.fromkeys(
        ("dtype", "torch_dtype"),
        optional(one_of("float32", "bfloat16", "float16", "float64", "float8_e4m3fn", "float8_e5m2")),
    ),
    **TOKEN_IDS,
}
_ROPE_KINDS: dict[str, Kind] = {
    "rope_theta": ROTARY_BASE,
    "factor": optional(ROPE_FACTOR),
    **dict.fromkeys(("type", "rope_type"), TEXT),
    "partial_rotary_factor": optional(above_zero(1)),
    **dict.fromkeys(("low_freq_factor", "high_freq_factor"), number(0, 1_000)),
    **dict.fromkeys(("beta_fast", "beta_slow", "attention_factor"), optional(above_zero(1_000))),
    **dict.fromkeys(("mscale", "mscale_all_dim"), optional(number(0, 1_000))),
    "truncate": FLAG,
    "original_max_position_embeddings": optional(POSITIONS),
}
# Megatron args with which a GPTModel is the plain model that all these families share.
PLAIN_MODEL: Mapping[str, Any] = {
    "add_position_embedding": True,
    "no_rope_freq": None,
    "layernorm_zero_centered_gamma": False,
    "apply_residual_connection_post_layernorm": False,
    "qk_layernorm": False,
    "qk_l2_norm": False,
    "squared_relu": False,
    "quick_geglu": False,
    "attention_output_gate": False,
    "softmax_type": "vanilla",
    "num_experts": None,
    "mtp_num_layers": None,
    "multi_latent_attention": False,
    "experimental_attention_variant": None,
    "heterogeneous_layers_config_path": None,
    "heterogeneous_layers_config_encoded_json": None,
    "hybrid_layer_pattern": None,
    "use_mup": False,
    "spec": None,
}


def check_kinds(config: Mapping[str, Any]) -> None:
    """Refuse fields whose type or range has no meaning, before anything is computed or built from them.

    Raises:
        ValueError: names the field, its value and what is allowed.
    """
    _refuse(wrong_field(config, _KINDS))


def check_rope_kinds(rope: Mapping[str, Any]) -> None:
    """Refuse fields of `rope_scaling` or `rope_parameters` as `check_kinds` does."""
    _refuse(wrong_field(rope, _ROPE_KINDS))


def check_experts(layers: int, experts: tuple[str, int], per_token: tuple[str, int]) -> None:
    """Refuse more experts than can be built, and tokens that go to more experts than there are.

    Args:
        experts, per_token: name and value of the two fields.
    """
    _refuse(wrong_experts(layers, experts, per_token))


def _refuse(found: tuple[str, Any, str] | None) -> None:
    if found is not None:
        field, value, allowed = found
        refuse_field(field, value, f"which must be {allowed}")


def check_fields(
    config: Mapping[str, Any],
    *,
    model_type: str,
    architecture: str,
    mapped: Collection[str],
    harmless: Collection[str],
    neutral: Mapping[str, tuple[Any, ...]],
) -> None:
    """Refuse a field unless it is mapped, harmless, or at a value that changes nothing.

    Args:
        mapped: fields that the family reads.
        harmless, neutral: the family's own fields, in addition to those of all families.

    Raises:
        ValueError: there is such a field; the message names it.
    """
    neutral = {**_NEUTRAL, **neutral}
    for field, values in neutral.items():
        if field in config and config[field] not in values:
            refuse_field(
                field, config[field], f"which Megatron's GPTModel cannot express; only {values[0]!r} converts"
            )
    architectures = config.get("architectures") or [architecture]
    if architectures != [architecture]:
        refuse_field("architectures", architectures, f"only {architecture} converts")
    unknown = sorted(set(config).difference(mapped, harmless, neutral, _HARMLESS))
    if unknown:
        raise ValueError(
            f"config.json has fields that the {model_type} conversion does not understand: {', '.join(unknown)}. "
            "Remove one only if it does not change what the model computes"
        )
