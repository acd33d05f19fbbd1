"""The text model of Gemma 3: norms before and after each part, which scale by 1 + weight, and two rotary bases.

The model also has embeddings times sqrt(hidden_size), attention scaled by a width that can differ from the head's, and
an MLP gated by GELU with tanh.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from megatron_fdd.convert.families.decoder import decoder_family
from megatron_fdd.convert.families.decoder_shape import COMMON_DEFAULTS, NO_BIASES, Dialect
from megatron_fdd.convert.families.rope_by_kind import RopeByKind
from megatron_fdd.host.layer_specs import LayerSpec, check_options
from megatron_fdd.host.model_fields import ROTARY_BASE, SCALE

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.training.models.gpt import GPTModelConfig

_DEFAULTS: dict[str, Any] = {
    **COMMON_DEFAULTS,
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_SPELLING = RopeByKind(_DEFAULTS, pattern=6)
_OPTIONS = {"query_pre_attn_scalar": SCALE, "rope_local_base_freq": ROTARY_BASE}


def _configure(config: GPTModelConfig, options: Mapping[str, Any]) -> None:
    """Set values that no argument of Megatron sets. Megatron has already checked the configuration.

    Raises:
        ValueError: an option is missing or of the wrong kind.
    """
    check_options(options, _OPTIONS)
    transformer = config.transformer
    transformer.activation_func = partial(torch.nn.functional.gelu, approximate="tanh")
    transformer.bias_activation_fusion = False
    transformer.softmax_scale = options["query_pre_attn_scalar"] ** -0.5
    transformer.window_rotary_base = options["rope_local_base_freq"]
    # Megatron multiplies embeddings only with muP. All other settings of muP keep their defaults and change nothing.
    transformer.use_mup = True
    # transformers rounds the factor to the dtype of the weights.
    scale = torch.tensor(transformer.hidden_size**0.5, dtype=transformer.params_dtype)
    transformer.mup_embedding_mult = scale.item()


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
            **NO_BIASES,
            "hidden_activation": ("gelu_pytorch_tanh",),
            "attn_logit_softcapping": (None,),
            "final_logit_softcapping": (None,),
            "use_bidirectional_attention": (False, None),
        },
        # The patterns are read if `layer_types` is absent; the last field says how transformers keeps keys and values.
        harmless=frozenset({"sliding_window_pattern", "_sliding_window_pattern", "cache_implementation"}),
        qk_norm=True,
        # Megatron multiplies with YaRN's factor in all layers, and here it would be in those without a window alone.
        rope_kinds=("default", "linear"),
        window_fields=("sliding_window", "layer_types"),
        norms=(
            ("input_layernorm", "input_layernorm"),
            ("self_attention.linear_proj.norm", "post_attention_layernorm"),
            ("pre_mlp_layernorm", "pre_feedforward_layernorm"),
            ("mlp.linear_fc2.norm", "post_feedforward_layernorm"),
        ),
        fixed={"layernorm_zero_centered_gamma": True},
        uncut={"hidden_size": "multiplies embeddings by its root"},
        layer_spec=LayerSpec(_build, _configure),
        own_fields=tuple(_OPTIONS),
        flatten=_SPELLING.flatten,
        restore=_SPELLING.restore,
    ),
    models="Gemma 3 without images, such as the 1B",
)
