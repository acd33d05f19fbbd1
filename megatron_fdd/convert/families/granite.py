"""Granite: a Llama whose embeddings, attention scores, residual branches and logits are multiplied by constants."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megatron_fdd.convert.families.decoder import decoder_family
from megatron_fdd.convert.families.decoder_shape import COMMON_DEFAULTS, Dialect
from megatron_fdd.host.layer_specs import LayerSpec, check_options
from megatron_fdd.host.model_fields import SCALE

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.training.models.gpt import GPTModelConfig

_MULTIPLIERS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
_DEFAULTS: dict[str, Any] = {
    **COMMON_DEFAULTS,
    **dict.fromkeys(_MULTIPLIERS, 1.0),
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}


def _configure(config: GPTModelConfig, options: Mapping[str, Any]) -> None:
    """Set the multipliers, none of which an argument of Megatron sets.

    Raises:
        ValueError: an option is missing or of the wrong kind.
    """
    check_options(options, dict.fromkeys(_MULTIPLIERS, SCALE))
    transformer = config.transformer
    transformer.softmax_scale = options["attention_multiplier"]
    transformer.residual_multiplier = options["residual_multiplier"]
    transformer.final_norm_factor = 1 / options["logits_scaling"]
    # Megatron multiplies embeddings only with muP. All other settings of muP keep their defaults and change nothing.
    transformer.use_mup = True
    transformer.mup_embedding_mult = options["embedding_multiplier"]


def _build(config: GPTModelConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    from megatron_fdd.host import layer_parts

    def change(layer: ModuleSpec) -> None:
        layer_parts.scale_branches(layer, config.transformer.residual_multiplier)

    return layer_parts.changed_block(config, vp_stage, change)


GRANITE = decoder_family(
    Dialect(
        "granite",
        "GraniteForCausalLM",
        _DEFAULTS,
        layer_spec=LayerSpec(_build, _configure),
        own_fields=_MULTIPLIERS,
    )
)
