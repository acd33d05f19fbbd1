"""Phi-3 and Phi-4, whose files join query, key and value, and gate and up; those with LongRoPE are refused."""

from __future__ import annotations

from typing import Any

from megatron_fdd.convert.families.decoder import decoder_family
from megatron_fdd.convert.families.decoder_shape import COMMON_DEFAULTS, NO_BIASES, Dialect
from megatron_fdd.convert.families.family import HfConfig, refuse_field

# transformers takes all of these for LongRoPE.
_LONG = ("longrope", "su", "yarn")


def _flatten(config: HfConfig) -> HfConfig:
    """Refuse LongRoPE, which scales each dimension by a learned factor."""
    for field in ("rope_scaling", "rope_parameters"):
        rope = config.get(field)
        if isinstance(rope, dict):
            kind = rope.get("rope_type", rope.get("type"))
            if kind in _LONG:
                refuse_field(
                    "rope_type",
                    kind,
                    "which in a phi3 means LongRoPE, and Megatron's rotary embedding has none; as a teacher it runs "
                    "with fdd teach --engine transformers",
                )
    return dict(config)


_DEFAULTS: dict[str, Any] = {
    **COMMON_DEFAULTS,
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
PHI3 = decoder_family(
    Dialect(
        "phi3",
        "Phi3ForCausalLM",
        _DEFAULTS,
        neutral={**NO_BIASES, "embd_pdrop": (0.0,), "resid_pdrop": (0.0,)},
        # LongRoPE alone reads the number of positions before scaling.
        harmless=frozenset({"original_max_position_embeddings", "auto_map"}),
        window_fields=("sliding_window",),
        partial_rotary=1.0,
        rope_kinds=("default",),
        fused=("qkv", "gate_up"),
        flatten=_flatten,
    ),
    models="Phi-3 and Phi-4",
    limits="LongRoPE (Phi-4-mini, 128k): Megatron has none; YaRN for a part of a head",
)
