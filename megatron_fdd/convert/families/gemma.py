"""What the Gemma models share: norms around each part that scale by 1 + weight, scaled embeddings, GELU with tanh.

Attention is scaled by a width that can differ from the head's.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from megatron_fdd.convert.families.decoder_shape import COMMON_DEFAULTS, NO_BIASES

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

DEFAULTS: dict[str, Any] = {
    **COMMON_DEFAULTS,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
NEUTRAL: dict[str, tuple[Any, ...]] = {
    **NO_BIASES,
    "hidden_activation": ("gelu_pytorch_tanh",),
    "use_bidirectional_attention": (False, None),
}
NORMS = (
    ("input_layernorm", "input_layernorm"),
    ("self_attention.linear_proj.norm", "post_attention_layernorm"),
    ("pre_mlp_layernorm", "pre_feedforward_layernorm"),
    ("mlp.linear_fc2.norm", "post_feedforward_layernorm"),
)
UNCUT = {"hidden_size": "multiplies embeddings by its root, which a cut would change"}
FIXED = {"layernorm_zero_centered_gamma": True}


def configure_gemma(transformer: TransformerConfig, query_pre_attn_scalar: float) -> None:
    """Set values that no argument of Megatron sets. Megatron has already checked the configuration."""
    transformer.activation_func = partial(torch.nn.functional.gelu, approximate="tanh")
    transformer.bias_activation_fusion = False
    transformer.softmax_scale = query_pre_attn_scalar**-0.5
    # Megatron multiplies embeddings only with muP. All other settings of muP keep their defaults and change nothing.
    transformer.use_mup = True
    # transformers rounds the factor to the dtype of the weights.
    scale = torch.tensor(transformer.hidden_size**0.5, dtype=transformer.params_dtype)
    transformer.mup_embedding_mult = scale.item()
