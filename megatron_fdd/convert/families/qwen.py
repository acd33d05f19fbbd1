"""Qwen2 and 2.5, with biases on query, key and value, and Qwen3, with normalised queries and keys.

Models of both types exist with and without sliding windows.
"""

from megatron_fdd.convert.families.decoder import decoder_family
from megatron_fdd.convert.families.decoder_shape import COMMON_DEFAULTS, NO_BIASES, Dialect

_WINDOW_FIELDS = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
_DEFAULTS = {
    **COMMON_DEFAULTS,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
QWEN2_DIALECT = Dialect(
    "qwen2",
    "Qwen2ForCausalLM",
    _DEFAULTS,
    # The biases of query, key and value do not depend on its config.
    neutral={**NO_BIASES, "use_mrope": (False,)},
    qkv_bias="always",
    window_fields=_WINDOW_FIELDS,
)
QWEN3_DIALECT = Dialect(
    "qwen3",
    "Qwen3ForCausalLM",
    {**_DEFAULTS, "head_dim": 128},
    neutral={"mlp_bias": (False,)},
    qk_norm=True,
    window_fields=_WINDOW_FIELDS,
)
QWEN2 = decoder_family(QWEN2_DIALECT, models="Qwen2, Qwen2.5")
QWEN3 = decoder_family(QWEN3_DIALECT, models="Qwen3, dense")
