"""The reading of the config.json of a model shaped like Llama, which refuses everything that is not understood."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_fdd.convert.families.config_fields import check_fields
from megatron_fdd.convert.families.decoder_shape import DecoderShape, Dialect
from megatron_fdd.convert.families.experts import read_experts
from megatron_fdd.convert.families.family import HfConfig, refuse_field
from megatron_fdd.convert.families.latent import read_latent
from megatron_fdd.convert.families.layer_kinds import read_windows
from megatron_fdd.convert.families.rope import ROPE_FIELDS, read_rope

# Fields that can change the function, each with the values at which it does not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "pretraining_tp": (1, None),
    "rope_interleaved": (False,),
}


def read_shape(dialect: Dialect, raw: HfConfig) -> DecoderShape:
    """Read the shape from config.json.

    Raises:
        ValueError: something is not understood, or cannot be expressed; the message names the field.
    """
    config = {**dialect.defaults, **dialect.flatten(raw)}
    _check_fields(dialect, config)
    plain = _plain_values(config)
    latent = None
    if dialect.latent:
        latent = read_latent(config, (plain["num_attention_heads"], plain["num_key_value_heads"]))
        plain["head_dim"] = latent.v_head_dim
    qkv_bias = dialect.qkv_bias == "always"
    if dialect.qkv_bias == "attention_bias":
        qkv_bias, plain["attention_bias"] = plain["attention_bias"], False
    layers = plain["num_hidden_layers"]
    windows = read_windows(dialect.model_type, dialect.window_fields, config, layers)
    shape = DecoderShape(
        **plain,
        qkv_bias=qkv_bias,
        qk_norm=config[dialect.qk_norm] if isinstance(dialect.qk_norm, str) else dialect.qk_norm,
        rope=read_rope(config, dialect.partial_rotary, dialect.rope_kinds),
        windows=windows,
        rotates=dialect.rotation.read(config, windows),
        experts=read_experts(dialect.experts, config, layers),
        latent=latent,
        own={field: config[field] for field in dialect.own_fields},
    )
    groups = shape.num_key_value_heads
    if shape.num_attention_heads % groups:
        refuse_field("num_key_value_heads", groups, "which must divide num_attention_heads")
    return shape


def _check_fields(dialect: Dialect, config: Mapping[str, Any]) -> None:
    """Refuse fields that the dialect does not know."""
    neutral = {**_NEUTRAL, **dialect.neutral}
    if "use_sliding_window" not in dialect.window_fields:
        neutral["use_sliding_window"] = (False, None)
    for field in dialect.harmless & neutral.keys():
        del neutral[field]
    mapped = {*DecoderShape.plain_fields(), *ROPE_FIELDS, *dialect.fields}
    check_fields(
        config,
        model_type=dialect.model_type,
        architecture=dialect.architecture,
        mapped=mapped | {"sliding_window", "layer_types"},  # checked where windows are read
        harmless=dialect.harmless,
        neutral=neutral,
    )


def _plain_values(config: Mapping[str, Any]) -> dict[str, Any]:
    derived = {
        "num_key_value_heads": lambda: config["num_attention_heads"],
        "head_dim": lambda: _equal_parts(config),
    }
    plain = {}
    for field in DecoderShape.plain_fields():
        value = config.get(field)
        if value is None and field not in derived:
            raise ValueError(f'config.json lacks "{field}"')
        plain[field] = derived[field]() if value is None else value
    return plain


def _equal_parts(config: Mapping[str, Any]) -> int:
    """Return the width of a head where config.json gives none."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    if hidden % heads:
        why = f"which must divide hidden_size ({hidden}) without a head_dim"
        refuse_field("num_attention_heads", heads, why)
    return hidden // heads
