"""A family that this package does not have, added from outside: HyperCLOVA X without multipliers.

Norms stand behind attention and MLP as well as before them, and attention scores may have a scale of their own. Name
this module with --fdd-plugin. docs/extend/family.md goes through it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megatron_fdd.convert.families import add_family
from megatron_fdd.convert.families.decoder import decoder_family
from megatron_fdd.convert.families.decoder_shape import COMMON_DEFAULTS, Dialect
from megatron_fdd.host.layer_specs import LayerSpec

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.training.models.gpt import GPTModelConfig


def build_layer(config: GPTModelConfig) -> ModuleSpec:
    """Take Megatron's own layer, and add two norms."""
    from megatron_fdd.host import layer_parts  # it imports Megatron, which a rehearsal has to prepare first

    layer = layer_parts.stock_layer(config)
    layer_parts.put_norms_behind(layer, config)
    return layer


def configure(config: GPTModelConfig, options: Mapping[str, Any]) -> None:
    """Set the scale of attention scores, which no argument of Megatron's sets; None is the usual one."""
    config.transformer.softmax_scale = options["attention_multiplier"]


HYPERCLOVAX = decoder_family(
    Dialect(
        "hyperclovax",
        "HyperCLOVAXForCausalLM",
        # What transformers assumes for an absent field.
        {**COMMON_DEFAULTS, "max_position_embeddings": 2048, "attention_multiplier": None},
        # These values alone convert; every other is refused by name.
        neutral={
            **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling"), (1.0,)),
            **dict.fromkeys(("attention_bias", "mlp_bias"), (False,)),
            "use_post_norm": (True,),
        },
        norms=(
            ("input_layernorm", "input_layernorm"),
            ("self_attention.linear_proj.norm", "post_norm1"),
            ("pre_mlp_layernorm", "post_attention_layernorm"),
            ("mlp.linear_fc2.norm", "post_norm2"),
        ),
        own_fields=("attention_multiplier",),
        layer_spec=LayerSpec(build_layer, configure),
    )
)
add_family(HYPERCLOVAX)
