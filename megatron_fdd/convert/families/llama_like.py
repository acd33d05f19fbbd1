"""Seed-OSS, SmolLM3 and ERNIE 4.5: Llama with one difference each."""

from megatron_fdd.convert.families.decoder import decoder_family
from megatron_fdd.convert.families.decoder_shape import COMMON_DEFAULTS, NO_BIASES, Dialect
from megatron_fdd.convert.families.layer_kinds import Rotation

# Biases on query, key and value alone.
SEED_OSS = decoder_family(
    Dialect(
        "seed_oss",
        "SeedOssForCausalLM",
        {
            **COMMON_DEFAULTS,
            "vocab_size": 155136,
            "hidden_size": 4096,
            "intermediate_size": 27648,
            "num_hidden_layers": 64,
            "num_attention_heads": 80,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 524288,
            "attention_bias": True,
            "attention_dropout": 0.1,
        },
        neutral={"attention_out_bias": (False,), "mlp_bias": (False,)},
        # Dropout of training; --hidden-dropout sets it.
        harmless=frozenset({"residual_dropout"}),
        qkv_bias="attention_bias",
    ),
    models="Seed-OSS",
)
# Some layers without rotary positions.
SMOLLM3 = decoder_family(
    Dialect(
        "smollm3",
        "SmolLM3ForCausalLM",
        {
            **COMMON_DEFAULTS,
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": True,
            "rope_theta": 2e6,
            "no_rope_layer_interval": 4,
            "use_sliding_window": False,
            "sliding_window": None,
        },
        harmless=frozenset({"max_window_layers", "pretraining_tp"}),
        window_fields=("sliding_window", "use_sliding_window", "layer_types"),
        rotation=Rotation.LISTED,
    ),
    models="SmolLM3",
)
# Rotary positions on neighbouring dimensions, which Megatron's YaRN does not have.
ERNIE4_5_DIALECT = Dialect(
    "ernie4_5",
    "Ernie4_5ForCausalLM",
    {
        **COMMON_DEFAULTS,
        "vocab_size": 103424,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 18,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "rope_theta": 5e5,
    },
    neutral={**NO_BIASES, "use_bias": (False, None)},
    rope_kinds=("default", "linear", "llama3"),
    fixed={"rotary_interleaved": True},
)
ERNIE4_5 = decoder_family(
    ERNIE4_5_DIALECT,
    models="ERNIE 4.5, dense",
    limits="YaRN: Megatron turns no neighbouring pairs with it",
)
