"""The model that Megatron's arguments describe: its configuration, and its layers by chunk."""

from __future__ import annotations

import argparse
import importlib.util
from functools import partial

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.models.gpt import GPTModelConfig
from torch import Tensor

from megatron_fdd.host.layer_specs import apply_layer_spec, logit_cap


def build_config(args: argparse.Namespace) -> GPTModelConfig:
    """Return Megatron's model configuration for these arguments: of a student, a teacher or a model to convert.

    It has what `gpt_config_from_args` forgets (Megatron 0.19.2 passes `--use-rope-scaling` on but leaves the factor at
    its default), and the layers of a family, if the arguments name some. A soft cap of the logits is the first of its
    `pre_wrap_hooks`.

    Raises:
        ValueError: see `apply_layer_spec`.
    """
    config = gpt_config_from_args(args)
    config.rope_scaling_factor = args.rope_scaling_factor
    apply_layer_spec(config, args)
    if logit_cap(config.transformer) is not None:
        config.pre_wrap_hooks.append(cap_own_logits)
    return config


def cap_own_logits(chunks: list[GPTModel]) -> list[GPTModel]:
    """Put the soft cap of its logits, if it has one, behind a model's own head; the student's is a pre-wrap hook.

    The losses of this package do not call the head; they read the cap from the configuration.
    """
    for chunk in chunks:
        cap = logit_cap(chunk.config)
        if chunk.post_process and cap is not None:
            chunk.output_layer.register_forward_hook(partial(_capped, cap))
    return chunks


def _capped(
    cap: float, _head: torch.nn.Module, _inputs: object, output: tuple[Tensor, Tensor | None]
) -> tuple[Tensor, Tensor | None]:
    """Return what the head gave with capped logits, in their dtype; Gemma 2 has no bias that is added later."""
    return cap * torch.tanh(output[0] / cap), output[1]


def check_same_sizes(config: GPTModelConfig, planned: GPTModelConfig) -> None:
    """Refuse a student of a training script that has other sizes than its arguments, which everything is planned by.

    Raises:
        ValueError: it is no config; or names every field that differs.
    """
    if not hasattr(config, "transformer"):
        raise ValueError(
            f"Parts.student returned {config!r:.100}; it must return a GPTModelConfig, such as that of "
            "host.model.build_config"
        )
    pairs = {
        "num_layers": (config.transformer.num_layers, planned.transformer.num_layers),
        "hidden_size": (config.transformer.hidden_size, planned.transformer.hidden_size),
        "share_embeddings_and_output_weights": (
            config.share_embeddings_and_output_weights,
            planned.share_embeddings_and_output_weights,
        ),
    }
    wrong = [
        f"{name} is {own} in it and {plan} by the flags" for name, (own, plan) in pairs.items() if own != plan
    ]
    if wrong:
        raise ValueError(
            f"Parts.student: its model is not the one that the flags describe: {'; '.join(wrong)}. Losses, stages and "
            "checks follow the flags; give the flags of this model"
        )


def planned_config(args: argparse.Namespace) -> TransformerConfig:
    """Return the configuration of the layers for these arguments, on any machine, without FP8 where it cannot be.

    Without TransformerEngine Megatron's configuration refuses FP8 for experts.
    """
    if importlib.util.find_spec("transformer_engine") is None:
        args = argparse.Namespace(**{**vars(args), "fp8": None, "fp8_param_gather": False})
    return build_config(args).transformer


def chunk_layers(config: TransformerConfig) -> tuple[int, ...]:
    """Return how many layers each chunk of a model with this configuration holds, in depth order.

    With virtual stages chunk c is on pipeline stage c % stages.
    """
    stages = config.pipeline_model_parallel_size
    virtual = config.virtual_pipeline_model_parallel_size
    layout = config.pipeline_model_parallel_layout
    order = [(stage, part) for part in range(virtual or 1) for stage in range(stages)]
    if layout is None:
        return tuple(
            get_num_layers_to_build(config, None if virtual is None else part, stage) for stage, part in order
        )
    # With a layout, Megatron's function answers for the calling rank, whichever stage is passed.
    assert isinstance(layout, PipelineParallelLayerLayout)
    return tuple(layout.layout[stage][part].count(LayerType.decoder) for stage, part in order)
