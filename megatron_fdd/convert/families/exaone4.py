"""EXAONE 4: norms behind attention and MLP, not before; where some layers have a window, the others do not rotate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_fdd.convert.families.decoder import decoder_family
from megatron_fdd.convert.families.decoder_shape import COMMON_DEFAULTS, NO_BIASES, Dialect
from megatron_fdd.convert.families.family import HfConfig, refuse_field
from megatron_fdd.convert.families.layer_kinds import Rotation
from megatron_fdd.host.layer_specs import LayerSpec

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.training.models.gpt import GPTModelConfig

_DEFAULTS: dict[str, Any] = {
    **COMMON_DEFAULTS,
    "vocab_size": 102400,
    "hidden_size": 4096,
    "intermediate_size": 16384,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "sliding_window": 4096,
}
_PATTERN = 4


def _flatten(config: HfConfig) -> HfConfig:
    """Name the kind of every layer, as transformers does."""
    flat = dict(config)
    if config.get("layer_types") is None:
        window = config.get("sliding_window", _DEFAULTS["sliding_window"])
        pattern = 0 if window is None else config.get("sliding_window_pattern", _PATTERN)
        if type(pattern) is not int:
            refuse_field(
                "sliding_window_pattern", pattern, "without layer_types: transformers reads a number alone"
            )
        layers = range(config.get("num_hidden_layers", _DEFAULTS["num_hidden_layers"]))
        kinds = ("full_attention", "sliding_attention")
        flat["layer_types"] = [kinds[pattern > 0 and (layer + 1) % pattern != 0] for layer in layers]
    return flat


def _build(config: GPTModelConfig) -> ModuleSpec:
    from megatron_fdd.host import layer_parts

    layer = layer_parts.stock_layer(config)
    layer_parts.drop_norms_before(layer, config)
    layer_parts.put_norms_behind(layer, config)
    return layer


EXAONE4 = decoder_family(
    Dialect(
        "exaone4",
        "Exaone4ForCausalLM",
        _DEFAULTS,
        neutral=NO_BIASES,
        # It is read if `layer_types` is absent.
        harmless=frozenset({"sliding_window_pattern"}),
        qk_norm=True,
        window_fields=("sliding_window", "layer_types"),
        rotation=Rotation.SLIDING,
        norms=(
            ("self_attention.linear_proj.norm", "post_attention_layernorm"),
            ("mlp.linear_fc2.norm", "post_feedforward_layernorm"),
        ),
        layer_spec=LayerSpec(_build),
        flatten=_flatten,
    ),
    models="EXAONE 4.0",
)
