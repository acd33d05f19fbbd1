"""Granite: a Llama whose embeddings, attention scores, residual branches and logits are multiplied by constants.

Its MLP may be a mixture of experts, which has all matrices of a layer's experts in two tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megatron_fdd.convert.families.decoder import decoder_family
from megatron_fdd.convert.families.decoder_shape import COMMON_DEFAULTS, Dialect
from megatron_fdd.convert.families.expert_naming import QWENS_PROJECTIONS, ExpertNaming, StackedNaming
from megatron_fdd.host.layer_specs import LayerSpec, check_options
from megatron_fdd.host.model_fields import SCALE

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.training.models.gpt import GPTModelConfig

_MULTIPLIERS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
_DEFAULTS: dict[str, Any] = {
    **COMMON_DEFAULTS,
    **dict.fromkeys(_MULTIPLIERS, 1.0),
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}


def _configure(config: GPTModelConfig, options: Mapping[str, Any]) -> None:
    """Set the multipliers, none of which an argument of Megatron sets.

    Raises:
        ValueError: an option is missing or of the wrong kind.
    """
    check_options(options, dict.fromkeys(_MULTIPLIERS, SCALE))
    transformer = config.transformer
    transformer.softmax_scale = options["attention_multiplier"]
    transformer.residual_multiplier = options["residual_multiplier"]
    transformer.final_norm_factor = 1 / options["logits_scaling"]
    # Megatron multiplies embeddings only with muP. All other settings of muP keep their defaults and change nothing.
    transformer.use_mup = True
    transformer.mup_embedding_mult = options["embedding_multiplier"]


def _build(config: GPTModelConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    from megatron_fdd.host import layer_block

    def change(layer: ModuleSpec) -> None:
        layer_block.scale_branches(layer, config.transformer.residual_multiplier)

    return layer_block.changed_block(config, vp_stage, change)


_GRANITE = Dialect(
    "granite",
    "GraniteForCausalLM",
    _DEFAULTS,
    layer_spec=LayerSpec(_build, _configure),
    own_fields=_MULTIPLIERS,
)
GRANITE = decoder_family(
    _GRANITE,
    models="Granite 3.x and 4.x without Mamba, dense",
    limits="in bf16 a scale of logits that is no power of two rounds at the final norm, not in the logits",
)
GRANITEMOE = decoder_family(
    Dialect(
        "granitemoe",
        "GraniteMoeForCausalLM",
        {**_DEFAULTS, "num_local_experts": 8, "num_experts_per_tok": 2},
        neutral={"mlp_bias": (False,)},
        # The load-balancing loss concerns only training.
        harmless=frozenset({"router_aux_loss_coef", "output_router_logits"}),
        experts=ExpertNaming(
            block="block_sparse_moe",
            projections=QWENS_PROJECTIONS,
            count_fields=("num_local_experts", "num_experts"),
            width_field="intermediate_size",
            router="router.layer.weight",
            stacked=StackedNaming(
                "input_linear.weight", "output_linear.weight", is_transposed=False, alternates=False
            ),
        ),
        layer_spec=LayerSpec(_build, _configure),
        own_fields=_MULTIPLIERS,
    ),
    dense=_GRANITE,
    models="Granite 3.x with experts",
    limits="as `granite`",
)
