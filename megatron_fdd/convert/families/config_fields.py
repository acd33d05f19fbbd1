"""Rules that all families share: fields of config.json that mean nothing, and Megatron args that no family sets."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from megatron_fdd.convert.families.family import refuse_field

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
