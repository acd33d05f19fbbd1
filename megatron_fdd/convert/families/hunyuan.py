"""Hunyuan's dense models: queries and keys normalised after their rotation, and a rotary base stretched by `alpha`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megatron_fdd.convert.families.decoder import decoder_family
from megatron_fdd.convert.families.decoder_shape import COMMON_DEFAULTS, Dialect
from megatron_fdd.convert.families.family import HfConfig, refuse_field
from megatron_fdd.host.field_kinds import optional
from megatron_fdd.host.layer_specs import LayerSpec, check_options
from megatron_fdd.host.model_fields import SCALE

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.training.models.gpt import GPTModelConfig

_ALPHA, _SPELLING = "rope_alpha", "rope_spelling"
_WIDTH = "attention_head_dim"  # head_dim once more
# Beside alpha; transformers reads none of them.
_UNUSED = {"beta_fast", "beta_slow", "factor", "mscale", "mscale_all_dim"}
# About classification, images, packing, and layers that share a cache (use_cla); transformers reads none of them.
_HARMLESS = frozenset(
    {
        *("class_num", "dense_list", "pool_type", "skip_cls_token", "num_media_embeds", "cla_share_factor"),
        *("org_vocab_size", "mask_init_id", "pad_id", "eod_token_id", "sep_token_id"),
        *("im_start_id", "im_end_id", "im_newline_id", "text_start_id", "text_end_id"),
    }
)
_OPTIONS = {_ALPHA: optional(SCALE)}


def _flatten(config: HfConfig) -> HfConfig:
    """Take alpha out of a rotary scaling of the type "dynamic", which is static with it; keep the spelling aside."""
    if config.get(_WIDTH) not in (None, config.get("head_dim")):
        refuse_field(
            _WIDTH, config[_WIDTH], "which must be head_dim, of which alone transformers makes the heads"
        )
    for field in ("rope_parameters", "rope_scaling"):
        rope = config.get(field) or {}
        if rope.get("rope_type", rope.get("type")) != "dynamic":
            continue
        alpha = rope.get("alpha")
        if not SCALE.fits(alpha):
            refuse_field(
                field, rope, "whose alpha must be a number above 0: only with it the angles are fixed"
            )
        unknown = sorted(set(rope) - _UNUSED - {"alpha", "type", "rope_type", "rope_theta"})
        if unknown:
            refuse_field(field, rope, f"in which {', '.join(unknown)} is not understood")
        rest = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else None
        return {**config, field: rest, _ALPHA: alpha, _SPELLING: rope}
    return dict(config)


def _restore(flat: HfConfig) -> HfConfig:
    """Put alpha back where it was."""
    config = dict(flat)
    spelling, alpha = config.pop(_SPELLING, None), config.pop(_ALPHA, None)
    if spelling is None:
        return config
    field = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    theta = config.get(field) or {}
    config[field] = {**spelling, **({"rope_theta": theta["rope_theta"]} if "rope_theta" in theta else {})}
    config[field]["alpha"] = alpha
    return config


def _configure(config: GPTModelConfig, options: Mapping[str, Any]) -> None:
    """Stretch the rotary base, which is then no whole number as Megatron's argument is.

    Raises:
        ValueError: the option is missing or of the wrong kind.
    """
    check_options(options, _OPTIONS)
    width = config.transformer.kv_channels
    assert width is not None
    if options[_ALPHA] is not None:
        config.rotary_base = config.rotary_base * options[_ALPHA] ** (width / (width - 2))


def _build(config: GPTModelConfig) -> ModuleSpec:
    from megatron_fdd.host import layer_attention, layer_parts

    layer = layer_parts.stock_layer(config)
    layer.submodules.self_attention.module = layer_attention.NormBehindRotationAttention
    return layer


HUNYUAN_V1_DENSE = decoder_family(
    Dialect(
        "hunyuan_v1_dense",
        "HunYuanDenseV1ForCausalLM",
        {
            **COMMON_DEFAULTS,
            "vocab_size": 290943,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            _ALPHA: None,
        },
        neutral={
            "mlp_bias": (False,),
            "use_qk_norm": (True,),  # transformers normalises always
            **dict.fromkeys(("use_cla", "use_mla", "use_mixed_mlp_moe", "add_classification_head"), (False,)),
            "position_embedding_xdrope": (False,),
            "use_rotary_pos_emb": (True,),
            "norm_type": ("rms",),
        },
        harmless=_HARMLESS | {_WIDTH, _SPELLING},
        qk_norm=True,
        qk_norm_names=(
            ("rotated_q_layernorm", "query_layernorm"),
            ("rotated_k_layernorm", "key_layernorm"),
        ),
        layer_spec=LayerSpec(_build, _configure),
        own_fields=(_ALPHA,),
        flatten=_flatten,
        restore=_restore,
    ),
    models="Hunyuan, dense",
)
