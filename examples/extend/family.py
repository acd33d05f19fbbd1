"""A family that this package does not have, added from outside: EXAONE 4.0 without sliding windows (as its 1.2B).

Its norms stand behind attention and MLP, and none before; queries and keys are normalised head by head. Name this
module with --fdd-plugin. docs/extend/family.md goes through it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_fdd.convert.families import add_family
from megatron_fdd.convert.families.decoder import decoder_family
from megatron_fdd.convert.families.decoder_shape import COMMON_DEFAULTS, NO_BIASES, Dialect
from megatron_fdd.host.layer_specs import LayerSpec

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.training.models.gpt import GPTModelConfig


def build_layer(config: GPTModelConfig) -> ModuleSpec:
    """Take Megatron's own layer, and move its norms."""
    from megatron_fdd.host import layer_parts  # it imports Megatron, which a rehearsal has to prepare first

    layer = layer_parts.stock_layer(config)
    layer_parts.drop_norms_before(layer, config)
    layer_parts.put_norms_behind(layer, config)
    return layer


EXAONE4 = decoder_family(
    Dialect(
        "exaone4",
        "Exaone4ForCausalLM",
        # What transformers assumes for an absent field: also a window, which this family refuses by name.
        {**COMMON_DEFAULTS, "rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "sliding_window": 4096},
        neutral=NO_BIASES,
        harmless=frozenset({"sliding_window_pattern"}),
        qk_norm=True,
        norms=(
            ("self_attention.linear_proj.norm", "post_attention_layernorm"),
            ("mlp.linear_fc2.norm", "post_feedforward_layernorm"),
        ),
        layer_spec=LayerSpec(build_layer),
    )
)
add_family(EXAONE4)
