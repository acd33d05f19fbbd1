"""Mistral: a Llama in which all layers may have a sliding window."""

from megatron_fdd.convert.families.decoder import decoder_family
from megatron_fdd.convert.families.decoder_shape import COMMON_DEFAULTS, NO_BIASES, Dialect

MISTRAL_DIALECT = Dialect(
    "mistral",
    "MistralForCausalLM",
    {
        **COMMON_DEFAULTS,
        "max_position_embeddings": 4096 * 32,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    # transformers gives it no biases, whatever its config says.
    neutral=NO_BIASES,
    window_fields=("sliding_window",),
)
MISTRAL = decoder_family(
    MISTRAL_DIALECT,
    models="Mistral 7B, Nemo, Small 3 without images",
    limits="a window for some layers alone",
)
