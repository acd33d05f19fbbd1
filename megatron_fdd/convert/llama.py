"""Llama 2 and 3.x, and Mistral without a sliding window."""

from megatron_fdd.convert.decoder import Dialect, decoder_family

_COMMON_DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
}
# What transformers assumes for a field that config.json leaves out.
LLAMA = decoder_family(
    Dialect("llama", "LlamaForCausalLM", {**_COMMON_DEFAULTS, "max_position_embeddings": 2048}, neutral={})
)
MISTRAL = decoder_family(
    Dialect(
        "mistral",
        "MistralForCausalLM",
        {
            **_COMMON_DEFAULTS,
            "max_position_embeddings": 4096 * 32,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
        },
        # transformers gives Mistral no biases whatever its config says.
        neutral={"attention_bias": (False,), "mlp_bias": (False,)},
    )
)
