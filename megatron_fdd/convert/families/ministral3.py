"""Ministral 3: a Mistral with YaRN, whose queries grow with their position from the length before scaling on.

Megatron has no such queries. They are as usual up to that length, and longer sequences are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megatron_fdd.convert.families.decoder import decoder_family
from megatron_fdd.convert.families.decoder_shape import COMMON_DEFAULTS, NO_BIASES, Dialect
from megatron_fdd.convert.families.family import HfConfig, refuse_field
from megatron_fdd.host.field_kinds import number
from megatron_fdd.host.layer_specs import LayerSpec, check_options
from megatron_fdd.host.model_fields import POSITIONS

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.training.models.gpt import GPTModelConfig

_BETA, _START = "llama_4_scaling_beta", "original_max_position_embeddings"
_OPTIONS = {_BETA: number(0, 1_000), _START: POSITIONS}
_ROPE: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    _START: 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    _BETA: 0.1,
}


def _rope_field(config: HfConfig) -> str:
    return "rope_scaling" if config.get("rope_scaling") else "rope_parameters"


def _flatten(config: HfConfig) -> HfConfig:
    """Take what scales queries out of the rotary fields, as the options of the layers."""
    field = _rope_field(config)
    rope = dict(config.get(field) or _ROPE)
    beta = rope.pop(_BETA, None)
    if not _OPTIONS[_BETA].fits(beta):
        refuse_field(_BETA, beta, f"which must be {_OPTIONS[_BETA].words}")
    if rope.get("rope_type", rope.get("type")) == "yarn" and rope.get(_START) is None:
        refuse_field(_START, None, "from which on queries grow; give the length before scaling")
    rope.pop("max_position_embeddings", None)  # transformers reads the one of the model
    return {**config, field: rope, _BETA: beta, _START: rope.get(_START)}


def _restore(flat: HfConfig) -> HfConfig:
    """Put the factor of queries back among the rotary fields."""
    config = {name: value for name, value in flat.items() if name not in _OPTIONS}
    field = _rope_field(config)
    config[field] = {**config[field], _BETA: flat[_BETA]}
    return config


def _configure(_config: GPTModelConfig, options: Mapping[str, Any]) -> None:
    """Refuse options that are missing or of the wrong kind."""
    check_options(options, _OPTIONS)


def _longest(options: Mapping[str, Any]) -> int:
    """Return the number of positions at which queries are as usual."""
    return options[_START]


def _build(config: GPTModelConfig) -> ModuleSpec:
    from megatron_fdd.host import layer_parts

    return layer_parts.stock_layer(config)


MINISTRAL3 = decoder_family(
    Dialect(
        "ministral3",
        "Ministral3ForCausalLM",
        {
            **COMMON_DEFAULTS,
            "vocab_size": 131072,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 34,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 262144,
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
        },
        neutral=NO_BIASES,
        window_fields=("sliding_window",),
        rope_kinds=("yarn",),
        layer_spec=LayerSpec(_build, _configure, _longest),
        longest=_longest,
        own_fields=tuple(_OPTIONS),
        flatten=_flatten,
        restore=_restore,
    )
)
