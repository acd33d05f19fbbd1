"""OLMo-3: OLMo-2 with sliding windows, and YaRN on the layers without one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megatron_fdd.convert.families.decoder import decoder_family
from megatron_fdd.convert.families.decoder_shape import COMMON_DEFAULTS, NO_BIASES, Dialect
from megatron_fdd.convert.families.family import HfConfig, refuse_field
from megatron_fdd.convert.families.olmo2 import keys_of
from megatron_fdd.convert.families.rope_by_kind import RopeByKind
from megatron_fdd.host.layer_specs import LayerSpec, check_options
from megatron_fdd.host.model_fields import ROTARY_BASE

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.training.models.gpt import GPTModelConfig

_THETA = 5e5
_DEFAULTS: dict[str, Any] = {
    **COMMON_DEFAULTS,
    "vocab_size": 50304,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "sliding_window": 4096,
    "rope_theta": _THETA,
    "rope_local_base_freq": _THETA,
}
_SPELLING = RopeByKind(_DEFAULTS, pattern=4)


def _flatten(config: HfConfig) -> HfConfig:
    """Spell the rotary positions in the old way. A `rope_theta` alone is that of full layers in transformers 5."""
    if not config.get("rope_parameters") and config.get("rope_theta", _THETA) != _THETA:
        refuse_field(
            "rope_theta",
            config["rope_theta"],
            f"which transformers gives to the layers without a window alone, and {_THETA:g} to the others; say both in "
            "rope_parameters",
        )
    return _SPELLING.flatten(config)


def _restore(flat: HfConfig) -> HfConfig:
    """Restore the spelling of config.json, where one base for all layers is no field of its own."""
    config = _SPELLING.restore(flat)
    if config.get("rope_local_base_freq") == _THETA:
        del config["rope_local_base_freq"]
    return config


def _configure(config: GPTModelConfig, options: Mapping[str, Any]) -> None:
    """Set the base of the layers with a window.

    Raises:
        ValueError: the option is missing or of the wrong kind; more tensor-parallel ranks than key heads share.
    """
    check_options(options, {"rope_local_base_freq": ROTARY_BASE})
    config.transformer.window_rotary_base = options["rope_local_base_freq"]
    keys_of("olmo3")(config, options)


def _build(config: GPTModelConfig) -> ModuleSpec:
    from megatron_fdd.host import layer_attention, layer_parts

    layer = layer_parts.stock_layer(config)
    layer_parts.drop_norms_before(layer, config)
    layer_parts.put_norms_behind(layer, config)
    layer.submodules.self_attention.module = layer_attention.WindowRotaryNormAttention
    return layer


OLMO3 = decoder_family(
    Dialect(
        "olmo3",
        "Olmo3ForCausalLM",
        _DEFAULTS,
        neutral=NO_BIASES,
        qk_norm=True,
        window_fields=("sliding_window", "layer_types"),
        norms=(
            ("self_attention.linear_proj.norm", "post_attention_layernorm"),
            ("mlp.linear_fc2.norm", "post_feedforward_layernorm"),
        ),
        layer_spec=LayerSpec(_build, _configure),
        own_fields=("rope_local_base_freq",),
        flatten=_flatten,
        restore=_restore,
    ),
    models="OLMo-3",
    limits="as `olmo2`; a base other than 500,000 without a kind of layer: transformers uses it for some layers",
)
