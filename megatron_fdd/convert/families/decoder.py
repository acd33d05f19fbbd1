"""The common part of the families shaped like Llama: RMSNorm, rotary positions, SwiGLU, grouped queries.

A `Dialect` says where a model type differs; the rest of this module translates its config.json in both directions.
"""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from typing import Any

from megatron_fdd.convert.families.config_fields import PLAIN_MODEL
from megatron_fdd.convert.families.decoder_reading import read_shape
from megatron_fdd.convert.families.decoder_rows import decoder_rows
from megatron_fdd.convert.families.decoder_shape import DecoderShape, Dialect
from megatron_fdd.convert.families.experts import FIXED_EXPERTS, Experts, write_experts
from megatron_fdd.convert.families.family import DenseSibling, Family, HfConfig, MegatronArgs, StoredFolder
from megatron_fdd.convert.families.joined_experts import as_joined
from megatron_fdd.convert.families.latent import (
    LatentShape,
    latent_rope_args,
    latent_rope_of_args,
)
from megatron_fdd.convert.families.layer_kinds import (
    AttentionWindows,
    Rotation,
    rotation_args,
    rotation_of_args,
    write_windows,
)
from megatron_fdd.convert.families.rope import ROPE_FIELDS, Rope, write_rope
from megatron_fdd.host.layer_specs import OPTIONS

_FIXED: dict[str, Any] = {
    **PLAIN_MODEL,
    "rotary_interleaved": False,
    "normalization": "RMSNorm",
    "swiglu": True,
    "glu_linear_offset": 0.0,
    "activation_func_clamp_value": None,
}


def _megatron_args(dialect: Dialect, config: HfConfig) -> MegatronArgs:
    shape = read_shape(dialect, config)
    biased = shape.attention_bias or shape.mlp_bias
    rope, options = shape.rope.megatron_args(), dict(shape.own)
    if shape.latent is not None:
        latent_rope, more = latent_rope_args(shape.rope)
        rope, options = shape.latent.megatron_args() | latent_rope, options | more
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
        "seq_length": _longest(dialect, shape),
        "layernorm_epsilon": shape.rms_norm_eps,
        "add_bias_linear": biased,
        "add_qkv_bias": biased or shape.qkv_bias,
        "qk_layernorm": shape.qk_norm,
        "untie_embeddings_and_output_weights": not shape.tie_word_embeddings,
        "attention_dropout": float(shape.attention_dropout),
        "hidden_dropout": 0.0,
        "init_method_std": shape.initializer_range,
        **rope,
        **shape.windows.megatron_args(),
        **rotation_args(shape.rotates),
        **(shape.experts.megatron_args() if shape.experts else {}),
        **({"moe_router_dtype": "fp32"} if dialect.experts and dialect.experts.float32_router else {}),
        **({OPTIONS: options} if options else {}),
    }


def _longest(dialect: Dialect, shape: DecoderShape) -> int:
    positions = shape.max_position_embeddings
    return positions if dialect.longest is None else min(positions, dialect.longest(shape.own))


def _shape_of_args(dialect: Dialect, args: Namespace, seed: DecoderShape) -> DecoderShape:
    """Read the shape from Megatron's args. What Megatron does not keep (which of two biases, tokens) is the seed's."""
    biased, qkv_bias = args.add_bias_linear, args.add_qkv_bias and not args.add_bias_linear
    fits = (
        qkv_bias and not biased
        if dialect.qkv_bias == "always"
        else not (qkv_bias and dialect.qkv_bias == "no")
    )
    if not fits or (biased and dialect.qkv_bias == "attention_bias"):
        raise ValueError(
            f"the checkpoint has biases {'on query, key and value alone' if qkv_bias else 'elsewhere'}; a "
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
        qkv_bias=qkv_bias,
        qk_norm=args.qk_layernorm,
        rope=latent_rope_of_args(args) if dialect.latent else Rope.of_args(args),
        windows=AttentionWindows.of_args(args),
        rotates=rotation_of_args(args),
        experts=Experts.of_args(args) if dialect.experts else None,
        latent=LatentShape.of_args(args) if dialect.latent else None,
        own={field: getattr(args, OPTIONS)[field] for field in dialect.own_fields},
    )


def _hf_config(dialect: Dialect, seed: HfConfig, args: Namespace) -> HfConfig:
    before = read_shape(dialect, seed)
    return _write(dialect, seed, before, _shape_of_args(dialect, args, before))


def _keep_layers(dialect: Dialect, config: HfConfig, layers: Sequence[int]) -> HfConfig:
    before = read_shape(dialect, config)
    return _write(dialect, config, before, before.keep_layers(layers))


def _write(dialect: Dialect, seed: HfConfig, before: DecoderShape, after: DecoderShape) -> HfConfig:
    """Return `seed` with new values where the two shapes differ; the other fields keep their spelling."""
    if before == after:
        return dict(seed)
    config = dialect.flatten(seed)
    changed = [
        field for field in DecoderShape.plain_fields() if getattr(before, field) != getattr(after, field)
    ]
    if after.latent is None and not {"hidden_size", "num_attention_heads"}.isdisjoint(changed):
        changed.append("head_dim")  # without the field it would follow from them
    config |= {field: getattr(after, field) for field in changed}
    if after.latent is not None and before.latent != after.latent:
        after.latent.write(config)
    config |= {field: value for field, value in after.own.items() if value != before.own[field]}
    if before.qkv_bias != after.qkv_bias:
        config["attention_bias"] = after.qkv_bias
    if before.qk_norm != after.qk_norm and isinstance(dialect.qk_norm, str):
        config[dialect.qk_norm] = after.qk_norm
    if before.rope != after.rope:
        write_rope(config, after.rope)
    if before.windows != after.windows:
        write_windows(dialect.window_fields, config, before.windows, after.windows)
    if before.rotates != after.rotates and dialect.rotation is Rotation.LISTED:
        config["no_rope_layers"] = [int(one) for one in after.rotates]
    if dialect.experts is not None and before.experts is not None and after.experts is not None:
        write_experts(dialect.experts, config, before.experts, after.experts)
    config = dialect.restore(config)
    again = read_shape(dialect, config)
    if again != after:
        fields = [field.name for field in dataclasses.fields(DecoderShape)]
        wrong = [name for name in fields if getattr(again, name) != getattr(after, name)]
        raise ValueError(
            f"a {dialect.model_type} config cannot say what the checkpoint has: {', '.join(wrong)}; pass "
            "--hf-config with a config of the right family"
        )
    return config


def _stacked(dialect: Dialect) -> tuple[str, ...]:
    """List the endings of tensors with all experts of a layer."""
    naming = None if dialect.experts is None else dialect.experts.stacked
    if naming is None:
        return ()
    return tuple(f".{name}{ending}" for name in (naming.gate_up, naming.down) for ending in ("", "_bias"))


def _dense_config(dialect: Dialect, dense: Dialect, config: HfConfig, width: int) -> HfConfig:
    """Return the config of a mixture with MLPs of `width` channels in place of its experts.

    Raises:
        ValueError: a config of the dense dialect cannot say what this one says.
    """
    before = read_shape(dialect, config)
    assert before.experts is not None
    if dense is dialect:
        experts = dataclasses.replace(before.experts, sparse=(False,) * before.num_hidden_layers)
        after = dataclasses.replace(before, intermediate_size=width, experts=experts)
        return _write(dialect, config, before, after)
    after = dataclasses.replace(before, intermediate_size=width, experts=None)
    seed = _common_fields(dialect, dense, config)
    seed |= {"model_type": dense.model_type, "architectures": [dense.architecture]}
    return _write(dense, seed, read_shape(dense, seed), after)


def _common_fields(dialect: Dialect, dense: Dialect, config: HfConfig) -> HfConfig:
    """Return a mixture's config without the fields that the dense dialect does not know."""
    assert dialect.experts is not None
    own = {*dialect.harmless, *dialect.neutral, *dialect.experts.fields}
    known = {*DecoderShape.plain_fields(), *ROPE_FIELDS, *dense.fields, *dense.harmless, *dense.neutral}
    flat = dialect.flatten(config)
    return {field: value for field, value in flat.items() if field in known or field not in own}


def decoder_family(
    dialect: Dialect, *, dense: Dialect | str = "", models: str = "", limits: str = ""
) -> Family:
    """Make the family that a dialect describes.

    Args:
        dense: of a mixture of experts, the dialect of the models with an MLP in their place, which is the same one if
            its config can say so; or why it cannot become one, for people.
        models, limits: for people, as in `Family`.
    """
    experts = FIXED_EXPERTS if dialect.experts else {}
    fixed = {**_FIXED, **experts, "qk_layernorm": dialect.qk_norm, **dialect.fixed}
    if isinstance(dialect.qk_norm, str):
        del fixed["qk_layernorm"]
    if dialect.rotation is not Rotation.ALL:
        del fixed["no_rope_freq"]
    if dialect.experts:
        del fixed["num_experts"]
    return Family(
        model_type=dialect.model_type,
        megatron_args=partial(_megatron_args, dialect),
        fixed=fixed,
        hf_config=partial(_hf_config, dialect),
        keep_layers=partial(_keep_layers, dialect),
        rows=lambda config: decoder_rows(dialect, read_shape(dialect, config)),
        layer_prefix="model.layers.{layer}.",
        ignored=("rotary_emb.inv_freq",),
        stacked=_stacked(dialect),
        tied=("lm_head.weight", "model.embed_tokens.weight"),
        layer_spec=dialect.layer_spec,
        left_out=dialect.left_out,
        uncut=dialect.uncut,
        variant=partial(_as_stored, dialect),
        dense=dense
        if isinstance(dense, str)
        else DenseSibling(dense.model_type, partial(_dense_config, dialect, dense)),
        models=models,
        limits=limits,
    )


def _as_stored(dialect: Dialect, family: Family, folder: StoredFolder) -> Family:
    """Return the family with joined experts, if a folder's files have them."""
    joined = as_joined(dialect, folder)
    if joined is None:
        return family
    return dataclasses.replace(
        family, rows=lambda config: decoder_rows(joined, read_shape(joined, config)), stacked=_stacked(joined)
    )
