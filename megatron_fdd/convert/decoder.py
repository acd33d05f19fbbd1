"""What the families shaped like Llama share: RMSNorm, rotary positions, SwiGLU, grouped queries."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron_fdd.convert.family import Family, HfConfig, MegatronArgs, Row, refuse
from megatron_fdd.convert.rope import ROPE_FIELDS, Rope, read_rope, write_rope
from megatron_fdd.convert.transforms import GroupedQkv, Stacked

# Fields that leave the model's function alone.
_HARMLESS = {
    "model_type", "architectures", "dtype", "torch_dtype", "transformers_version", "transformers.js_config",
    "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "_name_or_path", "id2label",
    "label2id", "num_labels", "return_dict", "output_attentions", "output_hidden_states", "problem_type",
    "is_llama_config", "unsloth_version", "unsloth_fixed", "_attn_implementation_autoset", "is_decoder",
}  # fmt: skip
# Fields that change the function, each with the values under which it does not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "pretraining_tp": (1, None),
    "sliding_window": (None,),
    "use_sliding_window": (False,),
    "partial_rotary_factor": (1.0, None),
    "rope_interleaved": (False,),
    "quantization_config": (None,),
    "chunk_size_feed_forward": (0,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "pruned_heads": ({}, None),
}
_FIXED: dict[str, Any] = {
    "position_embedding_type": "rope",
    "add_position_embedding": True,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "rotary_seq_len_interpolation_factor": None,
    "no_rope_freq": None,
    "normalization": "RMSNorm",
    "layernorm_zero_centered_gamma": False,
    "apply_residual_connection_post_layernorm": False,
    "qk_layernorm": False,
    "qk_l2_norm": False,
    "swiglu": True,
    "squared_relu": False,
    "quick_geglu": False,
    "glu_linear_offset": 0.0,
    "activation_func_clamp_value": None,
    "attention_output_gate": False,
    "window_size": None,
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


@dataclass(frozen=True, slots=True)
class Dialect:
    """Where two model types of this family differ: values of absent fields, and further neutral values."""

    model_type: str
    architecture: str
    defaults: Mapping[str, Any]
    neutral: Mapping[str, tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class _Shape:
    """What both sides say about a model, under the names of config.json."""

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    attention_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool
    attention_dropout: float
    initializer_range: float
    rope: Rope


_PLAIN_FIELDS = [f.name for f in dataclasses.fields(_Shape) if f.name != "rope"]


def _check_fields(dialect: Dialect, config: Mapping[str, Any]) -> None:
    """Every field is mapped, harmless, or at a value that changes nothing."""
    for field, values in {**_NEUTRAL, **dialect.neutral}.items():
        if field in config and config[field] not in values:
            refuse(
                field, config[field], f"which Megatron's GPTModel cannot express; only {values[0]!r} converts"
            )
    layer_types = config.get("layer_types")
    if layer_types is not None and set(layer_types) != {"full_attention"}:
        refuse("layer_types", layer_types, 'only "full_attention" layers convert')
    architectures = config.get("architectures") or [dialect.architecture]
    if architectures != [dialect.architecture]:
        refuse("architectures", architectures, f"only {dialect.architecture} converts")
    known = {*_PLAIN_FIELDS, *ROPE_FIELDS, *_HARMLESS, *_NEUTRAL, *dialect.neutral, "layer_types"}
    unknown = sorted(set(config) - known)
    if unknown:
        raise ValueError(
            f"config.json has fields that the {dialect.model_type} conversion does not understand: "
            f"{', '.join(unknown)}. Remove one only if it does not change what the model computes"
        )


def _read(dialect: Dialect, raw: HfConfig) -> _Shape:
    """config.json -> shape, everything not understood refused."""
    config = {**dialect.defaults, **raw}
    _check_fields(dialect, config)
    derived = {
        "num_key_value_heads": lambda: config["num_attention_heads"],
        "head_dim": lambda: config["hidden_size"] // config["num_attention_heads"],
    }
    plain = {}
    for field in _PLAIN_FIELDS:
        value = config.get(field)
        if value is None and field not in derived:
            raise ValueError(f'config.json lacks "{field}"')
        plain[field] = derived[field]() if value is None else value
    shape = _Shape(**plain, rope=read_rope(config))
    if shape.num_attention_heads % shape.num_key_value_heads:
        refuse("num_key_value_heads", shape.num_key_value_heads, "which must divide num_attention_heads")
    return shape


def _megatron_args(dialect: Dialect, config: HfConfig) -> MegatronArgs:
    shape = _read(dialect, config)
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
        "add_bias_linear": shape.attention_bias or shape.mlp_bias,
        "add_qkv_bias": shape.attention_bias or shape.mlp_bias,
        "untie_embeddings_and_output_weights": not shape.tie_word_embeddings,
        "attention_dropout": float(shape.attention_dropout),
        "hidden_dropout": 0.0,
        "init_method_std": shape.initializer_range,
        **shape.rope.megatron_args(),
    }


def _shape_of_args(args: Namespace, seed: _Shape) -> _Shape:
    """Megatron's args -> shape. What Megatron does not keep (which of two biases, tokens) is the seed's."""
    biased = args.add_bias_linear
    if args.add_qkv_bias != biased:
        raise ValueError("the checkpoint has biases on query, key and value alone; a Llama has no such form")
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
    )


def _hf_config(dialect: Dialect, seed: HfConfig, args: Namespace) -> HfConfig:
    before = _read(dialect, seed)
    after = _shape_of_args(args, before)
    config = dict(seed)
    for field in _PLAIN_FIELDS:
        if getattr(before, field) != getattr(after, field):
            config[field] = getattr(after, field)
    if "layer_types" in config:
        config["layer_types"] = ["full_attention"] * after.num_hidden_layers
    if before.rope != after.rope:
        write_rope(config, after.rope)
    return config


def _rows(dialect: Dialect, config: HfConfig) -> list[Row]:
    shape = _read(dialect, config)
    rows = [Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), vocabulary=True)]
    for layer in range(shape.num_hidden_layers):
        rows += _attention_rows(shape, layer) + _mlp_rows(shape, layer)
    rows.append(Row("decoder.final_layernorm.weight", ("model.norm.weight",)))
    if not shape.tie_word_embeddings:
        rows.append(Row("output_layer.weight", ("lm_head.weight",), vocabulary=True))
    return rows


def _attention_rows(shape: _Shape, layer: int) -> list[Row]:
    hf, mcore = f"model.layers.{layer}.", f"decoder.layers.{layer}."
    qkv = GroupedQkv(shape.num_attention_heads // shape.num_key_value_heads, shape.head_dim)
    rows = [Row(f"{mcore}input_layernorm.weight", (f"{hf}input_layernorm.weight",))]
    for kind in ("weight", "bias")[: 1 + (shape.attention_bias or shape.mlp_bias)]:
        present = kind == "weight" or shape.attention_bias
        names = tuple(f"{hf}self_attn.{part}_proj.{kind}" for part in "qkvo") if present else ()
        rows += [
            Row(f"{mcore}self_attention.linear_qkv.{kind}", names[:3], qkv),
            Row(f"{mcore}self_attention.linear_proj.{kind}", names[3:]),
        ]
    return rows


def _mlp_rows(shape: _Shape, layer: int) -> list[Row]:
    hf, mcore = f"model.layers.{layer}.", f"decoder.layers.{layer}."
    rows = [Row(f"{mcore}pre_mlp_layernorm.weight", (f"{hf}post_attention_layernorm.weight",))]
    for kind in ("weight", "bias")[: 1 + (shape.attention_bias or shape.mlp_bias)]:
        present = kind == "weight" or shape.mlp_bias
        names = tuple(f"{hf}mlp.{part}_proj.{kind}" for part in ("gate", "up", "down")) if present else ()
        rows += [
            Row(f"{mcore}mlp.linear_fc1.{kind}", names[:2], Stacked(2)),
            Row(f"{mcore}mlp.linear_fc2.{kind}", names[2:]),
        ]
    return rows


def decoder_family(dialect: Dialect) -> Family:
    return Family(
        model_type=dialect.model_type,
        megatron_args=partial(_megatron_args, dialect),
        fixed=_FIXED,
        hf_config=partial(_hf_config, dialect),
        rows=partial(_rows, dialect),
        layer_prefix="model.layers.{layer}.",
        ignored=("rotary_emb.inv_freq",),
        tied=("lm_head.weight", "model.embed_tokens.weight"),
    )
