"""ERNIE 4.5 with experts: a softmax router with a bias for the choice, both in float32, and a shared expert."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_fdd.convert.families.decoder import decoder_family
from megatron_fdd.convert.families.decoder_shape import COMMON_DEFAULTS, NO_BIASES, Dialect
from megatron_fdd.convert.families.expert_naming import (
    QWENS_LAYERS,
    QWENS_PROJECTIONS,
    ExpertNaming,
    SharedNaming,
)
from megatron_fdd.convert.families.family import HfConfig, refuse_field
from megatron_fdd.convert.families.llama_like import ERNIE4_5_DIALECT
from megatron_fdd.host.layer_specs import LayerSpec

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.training.models.gpt import GPTModelConfig

_DEFAULTS: dict[str, Any] = {
    **COMMON_DEFAULTS,
    "vocab_size": 103424,
    "hidden_size": 2560,
    "intermediate_size": 12288,
    "num_hidden_layers": 28,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_theta": 5e5,
    "moe_intermediate_size": 1536,
    "moe_num_experts": 64,
    "moe_num_shared_experts": 2,
}
_START, _END, _INTERVAL = "moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"
_PER_TOKEN = ("moe_k", "num_experts_per_tok")


def _dense_layers(config: HfConfig) -> list[int]:
    layers = config.get("num_hidden_layers", _DEFAULTS["num_hidden_layers"])
    start, end, interval = config.get(_START, 1), config.get(_END, -1), config.get(_INTERVAL, 1)
    for field, value in ((_START, start), (_END, end), (_INTERVAL, interval)):
        if type(value) is not int:
            refuse_field(field, value, "which must be a whole number")
    if interval < 1:
        refuse_field(_INTERVAL, interval, "which must be at least 1")
    end = layers - 1 if end == -1 else end
    return [n for n in range(layers) if not (start <= n <= end and (n + 1) % interval == 0)]


def _flatten(config: HfConfig) -> HfConfig:
    """Use Qwen's fields for the layers with experts and for their number per token."""
    flat = {name: value for name, value in config.items() if name not in (_START, _END, _INTERVAL)}
    flat["mlp_only_layers"] = _dense_layers(config)
    flat[_PER_TOKEN[1]] = flat.pop(_PER_TOKEN[0], 6)
    return flat


def _restore(flat: HfConfig) -> HfConfig:
    """Use ERNIE's own fields again."""
    config = dict(flat)
    dense, layers = config.pop("mlp_only_layers"), config["num_hidden_layers"]
    config.pop("decoder_sparse_step", None)
    sparse = [layer for layer in range(layers) if layer not in dense]
    config[_PER_TOKEN[0]] = config.pop(_PER_TOKEN[1])
    config[_START], config[_END] = (sparse[0], sparse[-1]) if sparse else (layers, layers)
    config[_INTERVAL] = 1
    return config


def _configure(config: GPTModelConfig, _options: object) -> None:
    """Refuse what Megatron's router would do beside choosing.

    Raises:
        ValueError: names the flag.
    """
    transformer = config.transformer
    asked = {
        "--moe-router-fusion": transformer.moe_router_fusion,
        "--moe-z-loss-coeff": transformer.moe_z_loss_coeff,
        "--moe-aux-loss-coeff": transformer.moe_aux_loss_coeff,
        "--moe-expert-capacity-factor": transformer.moe_expert_capacity_factor,
    }
    for flag, value in asked.items():
        if value:
            raise ValueError(
                f"{flag}: the router of an ernie4_5_moe is this package's, which has none; leave it out"
            )


def _build(config: GPTModelConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    from megatron_fdd.host import layer_block, layer_router

    return layer_block.changed_block(config, vp_stage, layer_router.use_softmax_bias)


ERNIE4_5_MOE = decoder_family(
    Dialect(
        "ernie4_5_moe",
        "Ernie4_5_MoeForCausalLM",
        _DEFAULTS,
        neutral={
            **NO_BIASES,
            "use_bias": (False, None),
            "moe_norm_min": (1e-12,),
            "moe_gate": ("topk",),
            "moe_use_aux_free": (True,),
        },
        # The load-balancing loss and the capacity concern only training.
        harmless=frozenset({"router_aux_loss_coef", "output_router_logits", "moe_capacity", "auto_map"}),
        rope_kinds=("default", "linear", "llama3"),
        fixed={"rotary_interleaved": True},
        experts=ExpertNaming(
            block="mlp",
            projections=QWENS_PROJECTIONS,
            count_fields=("moe_num_experts", "num_experts"),
            width_field="moe_intermediate_size",
            layer_fields=QWENS_LAYERS,
            bias="moe_statics.e_score_correction_bias",
            own_router=True,
            float32_router=True,
            shared=SharedNaming("shared_experts", count_field="moe_num_shared_experts"),
        ),
        layer_spec=LayerSpec(_build, _configure),
        flatten=_flatten,
        restore=_restore,
    ),
    dense=ERNIE4_5_DIALECT,
    models="ERNIE 4.5 with experts",
    limits="a bf16 training rounds the router, as Megatron does with every router; its bias is a constant",
)
