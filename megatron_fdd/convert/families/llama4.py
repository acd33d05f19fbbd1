"""The text model of Llama 4 without norms of queries and keys (Maverick), up to a length.

Every second layer may be a mixture of experts, of which a token goes to one, with a shared expert. From a length on,
attention is cut into chunks and its temperature changes: neither is in Megatron, and longer sequences are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megatron_fdd.convert.families.decoder import decoder_family
from megatron_fdd.convert.families.decoder_shape import COMMON_DEFAULTS, Dialect
from megatron_fdd.convert.families.expert_naming import (
    QWENS_LAYERS,
    QWENS_PROJECTIONS,
    ExpertNaming,
    SharedNaming,
    StackedNaming,
)
from megatron_fdd.convert.families.family import HfConfig, refuse_field
from megatron_fdd.convert.families.layer_kinds import AttentionWindows, Rotation
from megatron_fdd.host.field_kinds import optional
from megatron_fdd.host.layer_specs import LayerSpec, check_options
from megatron_fdd.host.model_fields import POSITIONS

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.training.models.gpt import GPTModelConfig

_OPTIONS = {"attention_chunk_size": optional(POSITIONS), "floor_scale": POSITIONS}
_DEFAULTS: dict[str, Any] = {
    **COMMON_DEFAULTS,
    "vocab_size": 202048,
    "hidden_size": 5120,
    "intermediate_size": 16384,
    "moe_intermediate_size": 8192,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096 * 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "use_qk_norm": True,
    "num_experts_per_tok": 1,
    "num_local_experts": 16,
    "no_rope_layer_interval": 4,
    "attention_chunk_size": 8192,
    "floor_scale": 8192,
}
# Llama 4's name of a width, and Qwen's.
_WIDTHS = (("intermediate_size", "moe_intermediate_size"), ("intermediate_size_mlp", "intermediate_size"))


def _flatten(config: HfConfig) -> HfConfig:
    """Use Qwen's fields for experts; leave out `layer_types`, which says once more which layers rotate."""
    own = {"moe_layers", "interleave_moe_layer_step", "layer_types", *(name for name, _ in _WIDTHS)}
    flat = {name: value for name, value in config.items() if name not in own}
    flat |= {theirs: config[name] for name, theirs in _WIDTHS if name in config}
    layers = config.get("num_hidden_layers", _DEFAULTS["num_hidden_layers"])
    if not flat.get("no_rope_layers"):
        flat.pop("no_rope_layers", None)
    rotates = Rotation.LISTED.read({**_DEFAULTS, **flat}, AttentionWindows(None, (False,) * layers))
    kinds = ["chunked_attention" if one else "full_attention" for one in rotates]
    if config.get("layer_types") not in (None, kinds):
        refuse_field("layer_types", config["layer_types"], "where no_rope_layers makes others chunked")
    sparse = config.get("moe_layers")
    if sparse is None:
        step = config.get("interleave_moe_layer_step", 1)
        sparse = range(step - 1, layers, step)
    flat["mlp_only_layers"] = [layer for layer in range(layers) if layer not in sparse]
    return flat


def _restore(flat: HfConfig) -> HfConfig:
    """Use Llama 4's own fields again."""
    theirs = {name for _, name in _WIDTHS} | set(QWENS_LAYERS)
    config = {name: value for name, value in flat.items() if name not in theirs}
    config |= {name: flat[theirs] for name, theirs in _WIDTHS if theirs in flat}
    dense = flat["mlp_only_layers"]
    config["moe_layers"] = [layer for layer in range(flat["num_hidden_layers"]) if layer not in dense]
    return config


def _configure(_config: GPTModelConfig, options: Mapping[str, Any]) -> None:
    """Refuse options that are missing or of the wrong kind."""
    check_options(options, _OPTIONS)


def _longest(options: Mapping[str, Any]) -> int:
    """Return the last length below the chunk, and below that from which the temperature changes."""
    return min(options["floor_scale"], options["attention_chunk_size"] or options["floor_scale"]) - 1


def _build(config: GPTModelConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    from megatron_fdd.host import layer_block

    return layer_block.changed_block(config, vp_stage, lambda _layer: None)


LLAMA4_TEXT = decoder_family(
    Dialect(
        "llama4_text",
        "Llama4ForCausalLM",
        _DEFAULTS,
        neutral={
            "mlp_bias": (False,),
            "use_qk_norm": (False,),
            "num_experts_per_tok": (1,),
            "router_jitter_noise": (0.0,),
        },
        # The temperature has no effect below the bound on length; the others concern only training.
        harmless=frozenset(
            {
                *("attn_temperature_tuning", "attn_scale", "for_llm_compressor"),
                *("router_aux_loss_coef", "output_router_logits"),
            }
        ),
        rotation=Rotation.LISTED,
        rope_kinds=("default", "linear", "llama3"),
        mlp_block="feed_forward",
        fixed={"rotary_interleaved": True, "moe_apply_probs_on_input": True},
        experts=ExpertNaming(
            block="feed_forward",
            projections=QWENS_PROJECTIONS,
            count_fields=("num_local_experts", "num_experts"),
            width_field="moe_intermediate_size",
            layer_fields=QWENS_LAYERS,
            router="router.weight",
            is_sigmoid=True,
            stacked=StackedNaming(
                "experts.gate_up_proj", "experts.down_proj", is_transposed=True, alternates=False
            ),
            shared=SharedNaming("shared_expert", width_field="moe_intermediate_size"),
        ),
        layer_spec=LayerSpec(_build, _configure, _longest),
        longest=_longest,
        own_fields=tuple(_OPTIONS),
        flatten=_flatten,
        restore=_restore,
    ),
    dense="its router scales what goes into experts, and transformers runs all of them at once, on all tokens",
    models="the text model of Llama 4 Maverick",
    limits="sequences from 8,192 tokens on, where attention is in chunks; Scout, which normalises behind rotation",
)
