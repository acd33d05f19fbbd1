"""GPT-2: learned positions, LayerNorm, biases everywhere, weights stored [in, out] (Conv1D)."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

from megatron_fdd.convert.families.config_fields import PLAIN_MODEL, check_fields
from megatron_fdd.convert.families.family import Family, HfConfig, MegatronArgs, WeightRow, refuse_field
from megatron_fdd.convert.families.transforms import FusedQkv, GroupedQkv, Same, Transform, Transposed

# Values that transformers assumes for fields that config.json leaves out.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
}
# Fields that do not change the model's function. (`reorder_and_upcast_attn` concerns the rounding of half precision.)
_HARMLESS = {
    "summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout",
    "predict_special_tokens", "output_past", "reorder_and_upcast_attn",
}  # fmt: skip
# Fields that can change the function, each with the values at which it does not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "n_special": (0,),
}
# For each activation, whether Megatron's fused form computes it: the fused form uses tanh, and the other form uses erf.
_GELU_IS_FUSED = {
    "gelu_new": True,
    "gelu_pytorch_tanh": True,
    "gelu_fast": True,
    "gelu": False,
    "gelu_python": False,
}
_FIXED: dict[str, Any] = {
    **PLAIN_MODEL,
    "position_embedding_type": "learned_absolute",
    "normalization": "LayerNorm",
    "group_query_attention": False,
    "add_bias_linear": True,
    "add_qkv_bias": True,
    "swiglu": False,
    "window_size": None,
}


def _check_fields(config: Mapping[str, Any]) -> None:
    """Refuse fields and values with which Megatron cannot build GPT-2."""
    check_fields(
        config,
        model_type="gpt2",
        architecture="GPT2LMHeadModel",
        mapped={*_DEFAULTS, "n_inner", "n_ctx"},
        harmless=_HARMLESS,
        neutral=_NEUTRAL,
    )
    if config.get("n_ctx") not in (None, config["n_positions"]):
        refuse_field("n_ctx", config["n_ctx"], f"which must equal n_positions ({config['n_positions']})")
    if config["activation_function"] not in _GELU_IS_FUSED:
        known = ", ".join(_GELU_IS_FUSED)
        refuse_field("activation_function", config["activation_function"], f"only {known} convert")
    if config["n_embd"] % config["n_head"]:
        refuse_field("n_head", config["n_head"], f"which must divide n_embd ({config['n_embd']})")
    if config["embd_pdrop"] != config["resid_pdrop"]:
        refuse_field(
            "embd_pdrop",
            config["embd_pdrop"],
            f"but resid_pdrop is {config['resid_pdrop']}; Megatron has one hidden dropout for both. Set them "
            "alike: they matter only in training, and the flag --hidden-dropout decides there",
        )


def _completed(raw: HfConfig) -> HfConfig:
    """Add every missing field on which a model's shape or training depends, and refuse what is not understood."""
    config = {**_DEFAULTS, **raw}
    _check_fields(config)
    if config.get("n_inner") is None:
        config["n_inner"] = 4 * config["n_embd"]
    return config


def _megatron_args(raw: HfConfig) -> MegatronArgs:
    config = _completed(raw)
    return {
        "num_layers": config["n_layer"],
        "hidden_size": config["n_embd"],
        "ffn_hidden_size": config["n_inner"],
        "num_attention_heads": config["n_head"],
        "num_query_groups": config["n_head"],
        "kv_channels": config["n_embd"] // config["n_head"],
        "vocab_size": config["vocab_size"],
        "max_position_embeddings": config["n_positions"],
        "seq_length": config["n_positions"],
        "layernorm_epsilon": config["layer_norm_epsilon"],
        "bias_gelu_fusion": _GELU_IS_FUSED[config["activation_function"]],
        "untie_embeddings_and_output_weights": not config["tie_word_embeddings"],
        "hidden_dropout": float(config["resid_pdrop"]),
        "attention_dropout": float(config["attn_pdrop"]),
        "init_method_std": config["initializer_range"],
    }


def _hf_config(seed: HfConfig, args: Namespace) -> HfConfig:
    if args.kv_channels * args.num_attention_heads != args.hidden_size:
        raise ValueError(
            f"the checkpoint has {args.num_attention_heads} heads of width {args.kv_channels} on a hidden size of "
            f"{args.hidden_size}; in a gpt2 they fill it exactly"
        )
    before = {**_DEFAULTS, "n_inner": None, **seed}
    activation = _completed(seed)["activation_function"]
    if _GELU_IS_FUSED[activation] != args.bias_gelu_fusion:
        activation = "gelu_new" if args.bias_gelu_fusion else "gelu"
    implied = before["n_inner"] is None and args.ffn_hidden_size == 4 * args.hidden_size
    after = {
        "vocab_size": args.vocab_size or before["vocab_size"],
        "n_positions": args.max_position_embeddings,
        "n_embd": args.hidden_size,
        "n_layer": args.num_layers,
        "n_head": args.num_attention_heads,
        "n_inner": None if implied else args.ffn_hidden_size,
        "activation_function": activation,
        "layer_norm_epsilon": args.layernorm_epsilon,
        "tie_word_embeddings": not args.untie_embeddings_and_output_weights,
    }
    config = {**seed, **{name: value for name, value in after.items() if value != before[name]}}
    if "n_ctx" in config:
        config["n_ctx"] = args.max_position_embeddings
    return config


def _rows(raw: HfConfig) -> list[WeightRow]:
    config = _completed(raw)
    rows = [
        WeightRow("embedding.word_embeddings.weight", ("transformer.wte.weight",), vocabulary=True),
        WeightRow("embedding.position_embeddings.weight", ("transformer.wpe.weight",)),
    ]
    for layer in range(config["n_layer"]):
        rows += _layer_rows(layer, head_dim=config["n_embd"] // config["n_head"])
    rows += _pair("decoder.final_layernorm", "transformer.ln_f", Same(), Same())
    if not config["tie_word_embeddings"]:
        rows.append(WeightRow("output_layer.weight", ("lm_head.weight",), vocabulary=True))
    return rows


def _layer_rows(layer: int, head_dim: int) -> list[WeightRow]:
    hf, mcore = f"transformer.h.{layer}.", f"decoder.layers.{layer}."
    qkv = FusedQkv(GroupedQkv(queries_per_group=1, head_dim=head_dim))
    conv = Transposed(Same())
    return [
        *_pair(f"{mcore}input_layernorm", f"{hf}ln_1", Same(), Same()),
        *_pair(f"{mcore}self_attention.linear_qkv", f"{hf}attn.c_attn", Transposed(qkv), qkv),
        *_pair(f"{mcore}self_attention.linear_proj", f"{hf}attn.c_proj", conv, Same()),
        *_pair(f"{mcore}pre_mlp_layernorm", f"{hf}ln_2", Same(), Same()),
        *_pair(f"{mcore}mlp.linear_fc1", f"{hf}mlp.c_fc", conv, Same()),
        *_pair(f"{mcore}mlp.linear_fc2", f"{hf}mlp.c_proj", conv, Same()),
    ]


def _pair(mcore: str, hf: str, weight: Transform, bias: Transform) -> list[WeightRow]:
    return [
        WeightRow(f"{mcore}.weight", (f"{hf}.weight",), weight),
        WeightRow(f"{mcore}.bias", (f"{hf}.bias",), bias),
    ]


GPT2 = Family(
    model_type="gpt2",
    megatron_args=_megatron_args,
    fixed=_FIXED,
    hf_config=_hf_config,
    keep_layers=lambda config, layers: {**config, "n_layer": len(layers)},
    rows=_rows,
    layer_prefix="transformer.h.{layer}.",
    ignored=(".attn.bias", ".attn.masked_bias"),
    tied=("lm_head.weight", "transformer.wte.weight"),
    prefix="transformer.",
    models="GPT-2 of all sizes",
)
