"""OLMo-2: norms after attention and MLP but not before them, and queries and keys normalised over all heads at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_fdd.convert.families.decoder import decoder_family
from megatron_fdd.convert.families.decoder_shape import COMMON_DEFAULTS, NO_BIASES, Dialect
from megatron_fdd.host.layer_specs import Configure, LayerSpec

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.training.models.gpt import GPTModelConfig


def keys_of(model_type: str) -> Configure:
    """Make what refuses more tensor-parallel ranks than there are key heads to share among them."""

    def check(config: GPTModelConfig, _options: object) -> None:
        groups, ranks = config.transformer.num_query_groups, config.transformer.tensor_model_parallel_size
        if groups is not None and groups % ranks:
            raise ValueError(
                f"--tensor-model-parallel-size {ranks}: the {groups} key heads of this {model_type} are normalised all "
                "at once, each on one rank: use a size that divides them"
            )

    return check


def _build(config: GPTModelConfig) -> ModuleSpec:
    from megatron_fdd.host import layer_parts

    layer = layer_parts.stock_layer(config)
    layer_parts.drop_norms_before(layer, config)
    layer_parts.put_norms_behind(layer, config)
    layer.submodules.self_attention.module = layer_parts.NormOverHeadsAttention
    return layer


_DEFAULTS: dict[str, Any] = {
    **COMMON_DEFAULTS,
    "vocab_size": 50304,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
}
OLMO2 = decoder_family(
    Dialect(
        "olmo2",
        "Olmo2ForCausalLM",
        _DEFAULTS,
        neutral=NO_BIASES,
        qk_norm=True,
        norms=(
            ("self_attention.linear_proj.norm", "post_attention_layernorm"),
            ("mlp.linear_fc2.norm", "post_feedforward_layernorm"),
        ),
        layer_spec=LayerSpec(_build, keys_of("olmo2")),
    ),
    models="OLMo-2",
    limits="tensor parallelism that does not divide the key heads: norms are over all heads",
)
