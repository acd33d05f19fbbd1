"""Nemotron and StarCoder2: a Llama's attention with LayerNorm, and an MLP without a gate."""

from __future__ import annotations

from megatron_fdd.convert.families.decoder import decoder_family
from megatron_fdd.convert.families.decoder_shape import COMMON_DEFAULTS, Dialect
from megatron_fdd.convert.families.family import HfConfig

_EPSILON = "rms_norm_eps"


def _nemotron(config: HfConfig) -> HfConfig:
    """Give the epsilon Llama's name."""
    flat = dict(config)
    if "norm_eps" in flat:
        flat[_EPSILON] = flat.pop("norm_eps")
    return flat


def _as_nemotron(flat: HfConfig) -> HfConfig:
    config = dict(flat)
    if _EPSILON in config:
        config["norm_eps"] = config.pop(_EPSILON)
    return config


def _starcoder2(config: HfConfig) -> HfConfig:
    """Give epsilon and biases Llama's names."""
    flat = dict(config)
    if "norm_epsilon" in flat:
        flat[_EPSILON] = flat.pop("norm_epsilon")
    if "use_bias" in flat:
        flat["attention_bias"] = flat["mlp_bias"] = flat.pop("use_bias")
    return flat


def _as_starcoder2(flat: HfConfig) -> HfConfig:
    config = dict(flat)
    if _EPSILON in config:
        config["norm_epsilon"] = config.pop(_EPSILON)
    if "attention_bias" in config or "mlp_bias" in config:
        config["use_bias"] = config.pop("attention_bias", False) or config.pop("mlp_bias", False)
        config.pop("mlp_bias", None)
    return config


# Its norms scale by 1 + weight.
NEMOTRON = decoder_family(
    Dialect(
        "nemotron",
        "NemotronForCausalLM",
        {
            **COMMON_DEFAULTS,
            "vocab_size": 256000,
            "hidden_size": 6144,
            "intermediate_size": 24576,
            "num_hidden_layers": 32,
            "num_attention_heads": 48,
            "hidden_act": "relu2",
            "max_position_embeddings": 4096,
            "initializer_range": 0.0134,
            "rms_norm_eps": 1e-5,
        },
        neutral={"hidden_act": ("relu2",)},
        partial_rotary=0.5,
        mlp=("up_proj", "down_proj"),
        norm_biases=True,
        fixed={
            "normalization": "LayerNorm",
            "layernorm_zero_centered_gamma": True,
            "swiglu": False,
            "squared_relu": True,
        },
        flatten=_nemotron,
        restore=_as_nemotron,
    ),
    models="Nemotron-3 and -4, Minitron",
)
STARCODER2 = decoder_family(
    Dialect(
        "starcoder2",
        "Starcoder2ForCausalLM",
        {
            **COMMON_DEFAULTS,
            "vocab_size": 49152,
            "hidden_size": 3072,
            "intermediate_size": 12288,
            "num_hidden_layers": 30,
            "num_attention_heads": 24,
            "num_key_value_heads": 2,
            "hidden_act": "gelu_pytorch_tanh",
            "max_position_embeddings": 4096,
            "initializer_range": 0.018042,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
        },
        neutral={
            "hidden_act": ("gelu_pytorch_tanh",),
            "residual_dropout": (0.0,),
            "embedding_dropout": (0.0,),
            "norm_type": ("layer_norm",),
            "mlp_type": ("default",),
        },
        window_fields=("sliding_window",),
        mlp=("c_fc", "c_proj"),
        norm_biases=True,
        # Megatron's fused form of GELU has tanh.
        fixed={"normalization": "LayerNorm", "swiglu": False, "bias_gelu_fusion": True},
        flatten=_starcoder2,
        restore=_as_starcoder2,
    ),
    models="StarCoder2",
)
