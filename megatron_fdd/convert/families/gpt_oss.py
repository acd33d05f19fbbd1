"""gpt-oss: experts with biases in two tensors a layer, attention sinks, windows on every second layer, clamped GLU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megatron_fdd.convert.families.decoder import decoder_family
from megatron_fdd.convert.families.decoder_shape import COMMON_DEFAULTS, Dialect
from megatron_fdd.convert.families.expert_naming import ExpertNaming, StackedNaming
from megatron_fdd.convert.families.family import HfConfig
from megatron_fdd.host.layer_specs import LayerSpec

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.training.models.gpt import GPTModelConfig

_FULL, _SLIDING = "full_attention", "sliding_attention"
_ROPE: Mapping[str, Any] = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _flatten(config: HfConfig) -> HfConfig:
    """Name the kind of every layer, and the rotary scaling, where transformers assumes them."""
    flat = dict(config)
    if config.get("layer_types") is None:
        layers = config.get("num_hidden_layers", _DEFAULTS["num_hidden_layers"])
        flat["layer_types"] = [_FULL if layer % 2 else _SLIDING for layer in range(layers)]
    if not config.get("rope_parameters") and not config.get("rope_scaling"):
        flat["rope_scaling"] = dict(_ROPE)
    return flat


def _configure(config: GPTModelConfig, _options: object) -> None:
    """Turn off a fusion that TransformerEngine's experts refuse beside biases."""
    config.transformer.bias_dropout_fusion = False


def _build(config: GPTModelConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    from megatron_fdd.host import layer_parts

    block = layer_parts.stock_block(config, vp_stage)
    layer_parts.let_biased_experts_train(block)
    return block


_DEFAULTS: dict[str, Any] = {
    **COMMON_DEFAULTS,
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "attention_bias": True,
    "sliding_window": 128,
    "rope_theta": 150000.0,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
}
GPT_OSS = decoder_family(
    Dialect(
        "gpt_oss",
        "GptOssForCausalLM",
        _DEFAULTS,
        # Megatron's quick GELU has the factor 1.702 built in.
        neutral={
            "attention_bias": (True,),
            "mlp_bias": (False,),
            "swiglu_limit": (7.0,),
            "swiglu_alpha": (1.702,),
        },
        # The last two repeat other fields in the published files.
        harmless=frozenset(
            {"router_aux_loss_coef", "output_router_logits", "initial_context_length", "experts_per_token"}
        ),
        window_fields=("sliding_window", "layer_types"),
        sinks=True,
        fixed={
            "swiglu": False,
            "quick_geglu": True,
            "glu_linear_offset": 1.0,
            "activation_func_clamp_value": 7.0,
            "softmax_type": "learnable",
        },
        experts=ExpertNaming(
            block="mlp",
            projections=("gate_proj", "up_proj", "down_proj"),
            count_fields=("num_local_experts", "num_experts"),
            width_field="intermediate_size",
            router="router.weight",
            router_bias="router.bias",
            stacked=StackedNaming(
                "experts.gate_up_proj", "experts.down_proj", is_transposed=True, alternates=True
            ),
        ),
        layer_spec=LayerSpec(_build, _configure),
        flatten=_flatten,
    ),
    dense="no dense type has attention sinks",
    models="gpt-oss, also in MXFP4",
    limits="experts cut by tensor parallelism: Megatron cannot cut their biases",
)
