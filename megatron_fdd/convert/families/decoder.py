"""The common part of the families shaped like Llama: RMSNorm, rotary positions, SwiGLU, grouped queries.

A `Dialect` says where a model type differs; the rest of this module translates its config.json in both directions.
"""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from megatron_fdd.convert.families.config_fields import PLAIN_MODEL, check_experts, check_fields
from megatron_fdd.convert.families.decoder_rows import decoder_rows
from megatron_fdd.convert.families.decoder_shape import (
    FIXED_EXPERTS,
    AttentionWindows,
    DecoderShape,
    Dialect,
    Experts,
)
from megatron_fdd.convert.families.family import Family, HfConfig, MegatronArgs, refuse_field
from megatron_fdd.convert.families.rope import ROPE_FIELDS, Rope, read_rope, write_rope
from megatron_fdd.host.layer_specs import OPTIONS

# Fields that can change the function, each with the values at which it does not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "pretraining_tp": (1, None),
    "partial_rotary_factor": (1.0, None),
    "rope_interleaved": (False,),
}
_FIXED: dict[str, Any] = {
    **PLAIN_MODEL,
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "rotary_seq_len_interpolation_factor": None,
    "normalization": "RMSNorm",
    "swiglu": True,
    "glu_linear_offset": 0.0,
    "activation_func_clamp_value": None,
}
_FULL, _SLIDING = "full_attention", "sliding_attention"


def _check_fields(dialect: Dialect, config: Mapping[str, Any]) -> None:
    """Refuse fields that the dialect does not know."""
    neutral = {**_NEUTRAL, **dialect.neutral}
    if "use_sliding_window" not in dialect.window_fields:
        neutral["use_sliding_window"] = (False, None)
    mapped = {*DecoderShape.plain_fields(), *ROPE_FIELDS, *dialect.window_fields, *dialect.expert_fields}
    mapped |= set(dialect.own_fields)
    check_fields(
        config,
        model_type=dialect.model_type,
        architecture=dialect.architecture,
        mapped=mapped | {"sliding_window", "layer_types"},  # checked where windows are read
        harmless=dialect.harmless,
        neutral=neutral,
    )


def _read(dialect: Dialect, raw: HfConfig) -> DecoderShape:
    """Read the shape from config.json, and refuse everything that is not understood."""
    config = {**dialect.defaults, **dialect.flatten(raw)}
    _check_fields(dialect, config)
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
    layers = plain["num_hidden_layers"]
    windows = _read_windows(dialect, config, layers)
    experts = _read_experts(dialect, config, layers)
    own = {field: config[field] for field in dialect.own_fields}
    shape = DecoderShape(**plain, rope=read_rope(config), windows=windows, experts=experts, own=own)
    if shape.num_attention_heads % shape.num_key_value_heads:
        refuse_field(
            "num_key_value_heads", shape.num_key_value_heads, "which must divide num_attention_heads"
        )
    return shape


def _equal_parts(config: Mapping[str, Any]) -> int:
    """Return the width of a head where config.json gives none."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    if hidden % heads:
        refuse_field(
            "num_attention_heads", heads, f"which must divide hidden_size ({hidden}) without a head_dim"
        )
    return hidden // heads


def _read_windows(dialect: Dialect, config: Mapping[str, Any], layers: int) -> AttentionWindows:
    size = config.get("sliding_window")
    if not dialect.window_fields and size is not None:
        refuse_field("sliding_window", size, f"which a {dialect.model_type} does not have; remove the field")
    if "use_sliding_window" in dialect.window_fields and not config["use_sliding_window"]:
        size = None
    slides = size is not None
    kinds = config.get("layer_types")
    if kinds is None and "max_window_layers" in dialect.window_fields:
        first = config["max_window_layers"]
        if slides and first is None:
            refuse_field("max_window_layers", first, "so that the first layer with a window is not known")
        return AttentionWindows(size, tuple(slides and layer >= first for layer in range(layers))).effective
    kinds = kinds or [_SLIDING if slides else _FULL] * layers
    allowed = {_FULL, _SLIDING} if slides and "layer_types" in dialect.window_fields else {_FULL}
    if slides and "layer_types" not in dialect.window_fields:
        allowed = {_SLIDING}
    if len(kinds) != layers or not set(kinds) <= allowed:
        only = " and ".join(f'"{kind}"' for kind in sorted(allowed))
        refuse_field("layer_types", kinds, f"where this config allows {layers} layers of {only}")
    return AttentionWindows(size, tuple(kind == _SLIDING for kind in kinds)).effective


def _read_experts(dialect: Dialect, config: Mapping[str, Any], layers: int) -> Experts | None:
    naming = dialect.experts
    if naming is None:
        return None
    counts = [config[field] for field in naming.count_fields if config.get(field) is not None]
    if not counts or any(count != counts[0] for count in counts):
        refuse_field(naming.count_fields[0], counts, "one number of experts is needed")
    per_token = config["num_experts_per_tok"]
    check_experts(layers, (naming.count_fields[0], counts[0]), ("num_experts_per_tok", per_token))
    return Experts(
        count=counts[0],
        per_token=per_token,
        width=config[naming.width_field],
        normalised=bool(config.get("norm_topk_prob", True)),
        sparse=_sparse_layers(config, layers),
    )


def _sparse_layers(config: Mapping[str, Any], layers: int) -> tuple[bool, ...]:
    """Find which layers have experts, by Qwen's two fields; without these fields every layer has experts."""
    step, dense = config.get("decoder_sparse_step") or 1, config.get("mlp_only_layers") or ()
    return tuple((layer + 1) % step == 0 and layer not in dense for layer in range(layers))


def _megatron_args(dialect: Dialect, config: HfConfig) -> MegatronArgs:
    shape = _read(dialect, config)
    biased = shape.attention_bias or shape.mlp_bias
    return {
        "num_layers": shape.num_hidden_layers,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.intermediate_size,
        "num_attention_heads": shape.num_attention_heads,
        "group_query_attention": shape.num_key_value_heads != shape.num_attention_heads,
        "num_query_groups": shape.num_key_value_heads,
        "kv_channels": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_position_embeddings,
        "seq_length": shape.max_position_embeddings,
        "layernorm_epsilon": shape.rms_norm_eps,
        "add_bias_linear": biased,
        "add_qkv_bias": biased or dialect.qkv_bias,
        "untie_embeddings_and_output_weights": not shape.tie_word_embeddings,
        "attention_dropout": float(shape.attention_dropout),
        "hidden_dropout": 0.0,
        "init_method_std": shape.initializer_range,
        **shape.rope.megatron_args(),
        **shape.windows.megatron_args(),
        **(shape.experts.megatron_args() if shape.experts else {}),
        **({OPTIONS: dict(shape.own)} if shape.own else {}),
    }


def _shape_of_args(dialect: Dialect, args: Namespace, seed: DecoderShape) -> DecoderShape:
    """Read the shape from Megatron's args. What Megatron does not keep (which of two biases, tokens) is the seed's."""
    biased = args.add_bias_linear
    if args.add_qkv_bias != (biased or dialect.qkv_bias) or (biased and dialect.qkv_bias):
        alone = args.add_qkv_bias and not biased
        raise ValueError(
            f"the checkpoint has biases {'on query, key and value alone' if alone else 'elsewhere'}; a "
            f"{dialect.model_type} has no such form"
        )
    which = (seed.attention_bias, seed.mlp_bias) if seed.attention_bias or seed.mlp_bias else (True, True)
    grouped = args.group_query_attention
    return dataclasses.replace(
        seed,
        num_hidden_layers=args.num_layers,
        hidden_size=args.hidden_size,
        intermediate_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_key_value_heads=args.num_query_groups if grouped else args.num_attention_heads,
        head_dim=args.kv_channels,
        vocab_size=args.vocab_size or seed.vocab_size,
        max_position_embeddings=args.max_position_embeddings,
        rms_norm_eps=args.layernorm_epsilon,
        attention_bias=biased and which[0],
        mlp_bias=biased and which[1],
        tie_word_embeddings=not args.untie_embeddings_and_output_weights,
        rope=Rope(args.rotary_base, args.rope_scaling_factor if args.use_rope_scaling else None),
        windows=AttentionWindows.of_args(args),
        experts=Experts.of_args(args) if dialect.experts else None,
        own={field: getattr(args, OPTIONS)[field] for field in dialect.own_fields},
    )


def _hf_config(dialect: Dialect, seed: HfConfig, args: Namespace) -> HfConfig:
    before = _read(dialect, seed)
    return _write(dialect, seed, before, _shape_of_args(dialect, args, before))


def _keep_layers(dialect: Dialect, config: HfConfig, layers: Sequence[int]) -> HfConfig:
    before = _read(dialect, config)
    return _write(dialect, config, before, before.keep_layers(layers))


def _write(dialect: Dialect, seed: HfConfig, before: DecoderShape, after: DecoderShape) -> HfConfig:
    """Return `seed` with new values where the two shapes differ; the other fields keep their spelling."""
    if before == after:
        return dict(seed)
    config = dialect.flatten(seed)
    for field in DecoderShape.plain_fields():
        if getattr(before, field) != getattr(after, field):
            config[field] = getattr(after, field)
    config |= {field: value for field, value in after.own.items() if value != before.own[field]}
    if before.rope != after.rope:
        write_rope(config, after.rope)
    if before.windows != after.windows:
        _write_windows(dialect, config, before.windows, after.windows)
    if before.experts is not None and after.experts is not None:
        _write_experts(dialect, config, before.experts, after.experts)
    config = dialect.restore(config)
    again = _read(dialect, config)
    if again != after:
        wrong = [
            f.name
            for f in dataclasses.fields(DecoderShape)
            if getattr(again, f.name) != getattr(after, f.name)
        ]
        raise ValueError(
            f"a {dialect.model_type} config cannot say what the checkpoint has: {', '.join(wrong)}; pass "
            "--hf-config with a config of the right family"
        )
    return config


def _write_windows(
    dialect: Dialect, config: HfConfig, before: AttentionWindows, after: AttentionWindows
) -> None:
    kinds = [_SLIDING if slides else _FULL for slides in after.slides]
    if before.size is None and after.size is None:
        if config.get("layer_types") is not None:
            config["layer_types"] = kinds
        return
    if after.size is not None or "use_sliding_window" not in dialect.window_fields:
        config["sliding_window"] = after.size
    if "use_sliding_window" in dialect.window_fields:
        config["use_sliding_window"] = after.size is not None
    if "layer_types" in dialect.window_fields or config.get("layer_types") is not None:
        config["layer_types"] = kinds


def _write_experts(dialect: Dialect, config: HfConfig, before: Experts, after: Experts) -> None:
    naming = dialect.experts
    assert naming is not None
    if before.count != after.count:
        for field in [name for name in naming.count_fields if name in config] or naming.count_fields[:1]:
            config[field] = after.count
    if before.per_token != after.per_token:
        config["num_experts_per_tok"] = after.per_token
    if before.width != after.width:
        config[naming.width_field] = after.width
    if before.normalised != after.normalised and naming.mixed:
        config["norm_topk_prob"] = after.normalised
    if _sparse_layers(config, len(after.sparse)) != after.sparse and naming.mixed:
        config["decoder_sparse_step"] = 1
        config["mlp_only_layers"] = [layer for layer, sparse in enumerate(after.sparse) if not sparse]


def decoder_family(dialect: Dialect) -> Family:
    """Make the family that a dialect describes."""
    fixed = {**_FIXED, "qk_layernorm": dialect.qk_norm, **dialect.fixed}
    if dialect.experts:
        del fixed["num_experts"]
        fixed |= FIXED_EXPERTS
    return Family(
        model_type=dialect.model_type,
        megatron_args=partial(_megatron_args, dialect),
        fixed=fixed,
        hf_config=partial(_hf_config, dialect),
        keep_layers=partial(_keep_layers, dialect),
        rows=lambda config: decoder_rows(dialect, _read(dialect, config)),
        layer_prefix="model.layers.{layer}.",
        ignored=("rotary_emb.inv_freq",),
        tied=("lm_head.weight", "model.embed_tokens.weight"),
        layer_spec=dialect.layer_spec,
    )
