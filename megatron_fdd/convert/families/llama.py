"""Llama 2 and 3.x."""

from megatron_fdd.convert.families.decoder import decoder_family
from megatron_fdd.convert.families.decoder_shape import COMMON_DEFAULTS, Dialect

LLAMA = decoder_family(
    Dialect(
        "llama",
        "LlamaForCausalLM",
        {**COMMON_DEFAULTS, "max_position_embeddings": 2048},
        harmless=frozenset({"is_llama_config"}),
    ),
    models="Llama 2 and 3.x, SmolLM2, TinyLlama",
)
