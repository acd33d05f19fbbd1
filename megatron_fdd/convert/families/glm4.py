"""GLM-4 (0414): norms before and behind attention and MLP; neighbouring pairs turn, in half of each head."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_fdd.convert.families.decoder import decoder_family
from megatron_fdd.convert.families.decoder_shape import COMMON_DEFAULTS, Dialect
from megatron_fdd.host.layer_specs import LayerSpec

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.training.models.gpt import GPTModelConfig


def _build(config: GPTModelConfig) -> ModuleSpec:
    from megatron_fdd.host import layer_parts

    layer = layer_parts.stock_layer(config)
    layer_parts.put_norms_behind(layer, config)
    return layer


GLM4 = decoder_family(
    Dialect(
        "glm4",
        "Glm4ForCausalLM",
        {
            **COMMON_DEFAULTS,
            "vocab_size": 151552,
            "hidden_size": 4096,
            "intermediate_size": 13696,
            "num_hidden_layers": 40,
            "num_attention_heads": 32,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1.5625e-7,
            "attention_bias": True,
        },
        neutral={"mlp_bias": (False,)},
        qkv_bias="attention_bias",
        partial_rotary=0.5,
        rope_kinds=(
            "default",
            "linear",
            "llama3",
        ),  # Megatron's YaRN turns whole heads, in pairs half a head apart
        fused=("gate_up",),
        norms=(
            ("input_layernorm", "input_layernorm"),
            ("self_attention.linear_proj.norm", "post_self_attn_layernorm"),
            ("pre_mlp_layernorm", "post_attention_layernorm"),
            ("mlp.linear_fc2.norm", "post_mlp_layernorm"),
        ),
        fixed={"rotary_interleaved": True},
        layer_spec=LayerSpec(_build),
    ),
    models="GLM-4-0414",
)
