"""Megatron-Bridge's description of a model as Megatron's arguments, and a check that nothing was lost on the way."""

from __future__ import annotations

import dataclasses
import re
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from megatron.core.activations import squared_relu
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from megatron_fdd.convert.families.family import MegatronArgs
from megatron_fdd.convert.mcore_model import argument_names
from megatron_fdd.host.model import build_config

# Fields that say where and how a model runs or how its training begins. All others say what it computes.
_HOW_IT_RUNS = re.compile(
    r".*parallel.*|.*_p2p_.*|tp_comm_.*|cp_comm_type|pipeline_dtype|deallocate_pipeline_outputs|timers"
    r"|fp16|bf16|params_dtype|enable_autocast|autocast_dtype|cross_entropy_.*|.*_fusion|persist_layer_norm"
    r"|.*init_method|use_cpu_initialization|perform_initialization|init_model_with_meta_device"
    r"|transformer_impl|attention_backend|use_te_rng_tracker|inference_sampling_seed"
    r"|moe_shared_expert_overlap|moe_token_dispatcher_type|mtp_.*"
)
# Megatron reads these from the model's configuration, although they are not fields of its own configuration.
_YARN = (
    "yarn_rotary_scaling_factor", "yarn_original_max_position_embeddings", "yarn_beta_fast", "yarn_beta_slow",
    "yarn_correction_range_round_to_int", "yarn_mscale", "yarn_mscale_all_dim",
)  # fmt: skip
# Where the model sets neither, Megatron scales with these values.
_YARN_SCALES: Mapping[str, float] = {"yarn_mscale": 1.0, "yarn_mscale_all_dim": 0.0}
# These are arguments of GPTModel itself, not of the configuration of its layers.
_EMBEDDINGS = (
    "position_embedding_type", "rotary_percent", "rotary_base", "rope_scaling", "seq_len_interpolation_factor",
    "share_embeddings_and_output_weights", "seq_length",
)  # fmt: skip


# Arguments that a training run chooses for itself.
_CHOSEN = re.compile(
    r"seq_length|.*dropout|.*init_method_std|moe_.*_loss_coeff|moe_router_load_balancing_type|moe_router_bias_update_rate"
    r"|moe_router_dtype|moe_grouped_gemm|moe_token_dispatcher_type|transformer_impl|bias_dropout_fusion"
)


def _computes(config_class: Any) -> list[str]:
    """List the fields of Megatron's configuration that say what a model computes."""
    names = [field.name for field in dataclasses.fields(config_class)]
    return [name for name in names if not _HOW_IT_RUNS.fullmatch(name)]


def _own_class(provider: Any) -> type[TransformerConfig]:
    return MLATransformerConfig if isinstance(provider, MLATransformerConfig) else TransformerConfig


def architecture_of(provider: Any) -> MegatronArgs:
    """Return the argparse destinations and values that describe the model of a provider.

    Args:
        provider: Megatron-Bridge's description of a GPTModel: Megatron's configuration with further fields.
    """
    known = argument_names()
    values = {name: getattr(provider, name) for name in _computes(_own_class(provider)) if name in known}
    activation, gated = provider.activation_func, provider.gated_linear_unit
    values |= {
        "transformer_impl": provider.transformer_impl,
        "num_experts": provider.num_moe_experts,
        "swiglu": gated and activation is F.silu,
        "quick_geglu": gated and activation is quick_gelu,
        "squared_relu": not gated and activation is squared_relu,
        "group_query_attention": provider.num_query_groups is not None
        and not provider.multi_latent_attention,
        "vocab_size": provider.vocab_size,
        "max_position_embeddings": provider.seq_length,
        "seq_length": provider.seq_length,
        "position_embedding_type": provider.position_embedding_type,
        "rotary_percent": provider.rotary_percent,
        "rotary_base": provider.rotary_base,
        "rotary_seq_len_interpolation_factor": provider.seq_len_interpolation_factor,
        "use_rope_scaling": provider.rope_scaling,
        "rope_scaling_factor": provider.rope_scaling_factor,
        "untie_embeddings_and_output_weights": not provider.share_embeddings_and_output_weights,
    }
    values["bias_dropout_fusion"] = False  # TransformerEngine's experts with biases refuse it
    if provider.num_moe_experts is not None:
        values["moe_token_dispatcher_type"] = "alltoall"  # the dispatcher that works at every layout
    if provider.position_embedding_type == "yarn":
        values |= _yarn_args(provider, known)
    return values


def _yarn_args(provider: Any, known: set[str]) -> MegatronArgs:
    values = {name: getattr(provider, name) for name in _YARN if name in known}
    values["rotary_scaling_factor"] = provider.yarn_rotary_scaling_factor
    scales = {name.removeprefix("yarn_"): _yarn_value(provider, name) for name in _YARN_SCALES}
    return values | scales


def check_trained(provider: Any, values: MegatronArgs, args: Namespace, model_type: str) -> None:
    """Refuse args of a checkpoint that do not describe the provider's model; `values` is its `architecture_of`."""
    defaults = {field.name: field.default for field in dataclasses.fields(provider)}
    # Where the model has Megatron's default, a run may have had a reason to change the value.
    told = {name: value for name, value in values.items() if name not in defaults or value != defaults[name]}
    wrong = {
        name: getattr(args, name)
        for name, value in told.items()
        if not _CHOSEN.fullmatch(name) and getattr(args, name, value) != value
    }
    if wrong:
        listed = ", ".join(f"{name} = {found!r} (needs {values[name]!r})" for name, found in wrong.items())
        raise ValueError(
            f"the checkpoint's model is not the {model_type} that its config.json describes: {listed}"
        )


def check_same(provider: Any, args: Namespace, model_type: str) -> None:
    """Refuse `args` from which training would build another model than the provider's. Changes the provider.

    Raises:
        ValueError: the models differ in fields that say what a model computes; the message names all of them.
    """
    ours = build_config(args)
    for field in dataclasses.fields(ours.transformer):
        if _HOW_IT_RUNS.fullmatch(field.name):  # so that both derive their values under the same conditions
            setattr(provider, field.name, getattr(ours.transformer, field.name))
    provider.finalize()
    provider.add_qkv_bias |= (
        provider.add_bias_linear
    )  # Megatron's arguments state what the second one implies
    pairs = {
        name: (getattr(provider, name), getattr(ours.transformer, name))
        for name in _computes(type(ours.transformer))
    }
    pairs |= {
        name: (getattr(provider, name), getattr(ours, name)) for name in _EMBEDDINGS if name not in pairs
    }
    if provider.rope_scaling:
        pairs["rope_scaling_factor"] = (provider.rope_scaling_factor, ours.rope_scaling_factor)
    if provider.position_embedding_type == "yarn":
        pairs |= {name: (_yarn_value(provider, name), getattr(ours.transformer, name)) for name in _YARN}
    differing = [
        f"{name} = {theirs!r} (the arguments give {own!r})"
        for name, (theirs, own) in pairs.items()
        if theirs != own
    ]
    if differing:
        raise ValueError(
            f"Megatron's arguments cannot express this {model_type} as Megatron-Bridge describes it: "
            + "; ".join(differing)
        )


def _yarn_value(provider: Any, name: str) -> Any:
    value = getattr(provider, name)
    return _YARN_SCALES.get(name) if value is None else value
