"""Gemma 2: soft caps of attention scores and of logits; every other layer has a sliding window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megatron_fdd.convert.families import gemma
from megatron_fdd.convert.families.decoder import decoder_family
from megatron_fdd.convert.families.decoder_shape import Dialect
from megatron_fdd.convert.families.family import HfConfig
from megatron_fdd.convert.families.layer_kinds import named_kinds
from megatron_fdd.host.field_kinds import optional
from megatron_fdd.host.layer_specs import LayerSpec, check_options
from megatron_fdd.host.model_fields import SCALE

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.training.models.gpt import GPTModelConfig

_SCORES, _LOGITS = "attn_logit_softcapping", "final_logit_softcapping"
_DEFAULTS: dict[str, Any] = {
    **gemma.DEFAULTS,
    "vocab_size": 256000,
    "max_position_embeddings": 8192,
    _SCORES: 50.0,
    _LOGITS: 30.0,
}
_OPTIONS = {"query_pre_attn_scalar": SCALE, **dict.fromkeys((_SCORES, _LOGITS), optional(SCALE))}


def _flatten(config: HfConfig) -> HfConfig:
    """Name the kind of every layer."""
    layers = config.get("num_hidden_layers", _DEFAULTS["num_hidden_layers"])
    return {**config, "layer_types": named_kinds(config, 2, layers)}


def _configure(config: GPTModelConfig, options: Mapping[str, Any]) -> None:
    """Set values that no argument of Megatron sets.

    Raises:
        ValueError: an option is missing or of the wrong kind, or the modules cannot cap attention scores.
    """
    check_options(options, _OPTIONS)
    transformer = config.transformer
    gemma.configure_gemma(transformer, options["query_pre_attn_scalar"])
    transformer.attention_score_cap, transformer.logit_cap = options[_SCORES], options[_LOGITS]
    if options[_SCORES] is not None and transformer.transformer_impl != "local":
        raise ValueError(
            f"--transformer-impl {transformer.transformer_impl}: attention scores of a gemma2 have a soft cap "
            f"({_SCORES} {options[_SCORES]:g}), which none of its kernels has; use --transformer-impl local, and where "
            "that cannot (context parallelism, packed documents) store a teacher's features with `fdd teach`"
        )


def _build(config: GPTModelConfig) -> ModuleSpec:
    from megatron_fdd.host import layer_attention, layer_parts

    layer = layer_parts.stock_layer(config)
    layer_parts.put_norms_behind(layer, config)
    if config.transformer.attention_score_cap is not None:
        layer.submodules.self_attention.module = layer_attention.CappedScoresAttention
    return layer


GEMMA2 = decoder_family(
    Dialect(
        "gemma2",
        "Gemma2ForCausalLM",
        _DEFAULTS,
        neutral=gemma.NEUTRAL,
        # transformers reads `hidden_activation` alone. The last field says how it keeps keys and values.
        harmless=frozenset({"hidden_act", "cache_implementation"}),
        window_fields=("sliding_window", "layer_types"),
        norms=gemma.NORMS,
        fixed=gemma.FIXED,
        uncut=gemma.UNCUT,
        layer_spec=LayerSpec(_build, _configure),
        own_fields=tuple(_OPTIONS),
        flatten=_flatten,
    )
)
