"""Cohere 2 (Command R7B, Command A): attention and MLP side by side on one LayerNorm without a bias, scaled logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megatron_fdd.convert.families.decoder import decoder_family
from megatron_fdd.convert.families.decoder_shape import COMMON_DEFAULTS, Dialect
from megatron_fdd.convert.families.family import HfConfig
from megatron_fdd.convert.families.layer_kinds import Rotation, named_kinds
from megatron_fdd.host.layer_specs import LayerSpec, check_options
from megatron_fdd.host.model_fields import SCALE

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.training.models.gpt import GPTModelConfig

_DEFAULTS: dict[str, Any] = {
    **COMMON_DEFAULTS,
    "vocab_size": 256000,
    "hidden_size": 8192,
    "intermediate_size": 22528,
    "num_hidden_layers": 40,
    "num_attention_heads": 64,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "logit_scale": 0.0625,
    "sliding_window": 4096,
}
_PATTERN = 4
_OPTIONS = {"logit_scale": SCALE}


def _flatten(config: HfConfig) -> HfConfig:
    """Name the kind of every layer, and call the norm's epsilon as Llama does."""
    flat = dict(config)
    if "layer_norm_eps" in flat:
        flat["rms_norm_eps"] = flat.pop("layer_norm_eps")
    layers = config.get("num_hidden_layers", _DEFAULTS["num_hidden_layers"])
    flat["layer_types"] = named_kinds(config, _PATTERN, layers)
    return flat


def _restore(flat: HfConfig) -> HfConfig:
    """Call the epsilon by its own name."""
    config = dict(flat)
    if "rms_norm_eps" in config:
        config["layer_norm_eps"] = config.pop("rms_norm_eps")
    return config


def _configure(config: GPTModelConfig, options: Mapping[str, Any]) -> None:
    """Set the scale of logits, and refuse what Megatron's own layer alone can do.

    Raises:
        ValueError: the option is missing or of the wrong kind; or names a flag.
    """
    check_options(options, _OPTIONS)
    transformer = config.transformer
    transformer.final_norm_factor = options["logit_scale"]
    transformer.bias_free_norms = True
    if transformer.cuda_graph_impl != "none":
        raise ValueError(
            f"--cuda-graph-impl {transformer.cuda_graph_impl}: not with the layers of a cohere2, which are this "
            "package's; leave it out"
        )
    others = sorted(set(transformer.recompute_modules or ()) - {"core_attn"})
    if transformer.recompute_granularity == "selective" and others:
        raise ValueError(
            f"--recompute-modules {' '.join(others)}: the layers of a cohere2 are our own: give core_attn alone, "
            "or --recompute-granularity full"
        )


def _build(config: GPTModelConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    from megatron_fdd.host import layer_block, parallel_layer
    from megatron_fdd.host.patches.norms import BiasFreeLayerNorm

    def change(layer: ModuleSpec) -> None:
        parallel_layer.make_parallel(layer, config)

    return layer_block.changed_block(config, vp_stage, change, norm=BiasFreeLayerNorm)


COHERE2 = decoder_family(
    Dialect(
        "cohere2",
        "Cohere2ForCausalLM",
        _DEFAULTS,
        neutral={
            "mlp_bias": (False,),
            "position_embedding_type": ("rope_gptj",),
            "rotary_pct": (1.0,),
            "use_embedding_sharing": (True,),
            "use_gated_activation": (True,),
            "use_parallel_block": (True,),
            "use_qk_norm": (False,),
        },
        # The pattern is read if `layer_types` is absent; the others describe it once more, or where tensors are kept.
        harmless=frozenset(
            {
                *(
                    "sliding_window_pattern",
                    "_sliding_window_pattern",
                    "layer_switch",
                    "use_parallel_embedding",
                ),
                *("order_of_interleaved_layers", "cache_implementation"),
            }
        ),
        window_fields=("sliding_window", "layer_types"),
        rotation=Rotation.WINDOWED,
        rope_kinds=("default", "linear", "llama3"),
        norms=(("input_layernorm", "input_layernorm"),),
        fixed={"rotary_interleaved": True, "normalization": "LayerNorm"},
        layer_spec=LayerSpec(_build, _configure),
        own_fields=tuple(_OPTIONS),
        flatten=_flatten,
        restore=_restore,
    ),
    models="Command R7B, Command A",
    limits="scales of logits as `granite`; CUDA graphs, and recompute of other parts than core attention or the layer, "
    "which is of another form",
)
