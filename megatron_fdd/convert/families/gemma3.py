"""The text model of Gemma 3: two rotary bases, and normalised queries and keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megatron_fdd.convert.families import gemma
from megatron_fdd.convert.families.decoder import decoder_family
from megatron_fdd.convert.families.decoder_shape import Dialect
from megatron_fdd.convert.families.rope_by_kind import RopeByKind
from megatron_fdd.host.layer_specs import LayerSpec, check_options
from megatron_fdd.host.model_fields import ROTARY_BASE, SCALE

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.training.models.gpt import GPTModelConfig

_DEFAULTS: dict[str, Any] = {
    **gemma.DEFAULTS,
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
}
_SPELLING = RopeByKind(_DEFAULTS, pattern=6)
_OPTIONS = {"query_pre_attn_scalar": SCALE, "rope_local_base_freq": ROTARY_BASE}


def _configure(config: GPTModelConfig, options: Mapping[str, Any]) -> None:
    """Set values that no argument of Megatron sets.

    Raises:
        ValueError: an option is missing or of the wrong kind.
    """
    check_options(options, _OPTIONS)
    gemma.configure_gemma(config.transformer, options["query_pre_attn_scalar"])
    config.transformer.window_rotary_base = options["rope_local_base_freq"]


def _build(config: GPTModelConfig) -> ModuleSpec:
    from megatron_fdd.host import layer_parts

    layer = layer_parts.stock_layer(config)
    layer_parts.put_norms_behind(layer, config)
    layer.submodules.self_attention.module = layer_parts.WindowRotaryAttention
    return layer


GEMMA3_TEXT = decoder_family(
    Dialect(
        "gemma3_text",
        "Gemma3ForCausalLM",
        _DEFAULTS,
        neutral={
            **gemma.NEUTRAL,
            "attn_logit_softcapping": (None,),
            "final_logit_softcapping": (None,),
        },
        # The patterns are read if `layer_types` is absent; the last field says how transformers keeps keys and values.
        harmless=frozenset({"sliding_window_pattern", "_sliding_window_pattern", "cache_implementation"}),
        qk_norm=True,
        # Megatron multiplies with YaRN's factor in all layers, and here it would be in those without a window alone.
        rope_kinds=("default", "linear"),
        window_fields=("sliding_window", "layer_types"),
        norms=gemma.NORMS,
        fixed=gemma.FIXED,
        uncut=gemma.UNCUT,
        layer_spec=LayerSpec(_build, _configure),
        own_fields=tuple(_OPTIONS),
        flatten=_SPELLING.flatten,
        restore=_SPELLING.restore,
    )
)
