"""The model that Megatron's arguments describe: its configuration, and its layers by chunk."""

from __future__ import annotations

import argparse
import importlib.util

from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.models.gpt import GPTModelConfig

from megatron_fdd.host.layer_specs import apply_layer_spec


def build_config(args: argparse.Namespace) -> GPTModelConfig:
    """Return Megatron's model configuration for these arguments: of a student, a teacher or a model to convert.

    It has what `gpt_config_from_args` forgets (Megatron 0.19.2 passes `--use-rope-scaling` on but leaves the factor at
    its default), and the layers of a family, if the arguments name some.

    Raises:
        ValueError: see `apply_layer_spec`.
    """
    config = gpt_config_from_args(args)
    config.rope_scaling_factor = args.rope_scaling_factor
    apply_layer_spec(config, args)
    return config


def check_same_sizes(config: GPTModelConfig, planned: GPTModelConfig) -> None:
    """Refuse a student of a training script that has other sizes than its arguments, which everything is planned by.

    Raises:
        ValueError: names every field that differs.
    """
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


def planned_layers(args: argparse.Namespace) -> tuple[int, ...]:
    """Return `chunk_layers` for these arguments, on any machine.

    Without TransformerEngine Megatron's configuration refuses FP8 for experts, which does not affect how layers are
    cut.
    """
    if importlib.util.find_spec("transformer_engine") is None:
        args = argparse.Namespace(**{**vars(args), "fp8": None, "fp8_param_gather": False})
    return chunk_layers(build_config(args).transformer)


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
