"""Checks of the sequence length and of the parallel sizes that a model can take."""

from __future__ import annotations

import argparse
import re

from megatron_fdd.host.role import Role
from megatron_fdd.plan.context import Model
from megatron_fdd.step.teacher.arguments import even_layout


def check_length(model: Model) -> None:
    """Refuse sequences longer than a model takes.

    Raises:
        ValueError: names the length, the bound and the model.
    """
    length, positions = model.args.seq_length, model.args.max_position_embeddings
    if None in (length, positions) or length <= positions:
        return  # Megatron asks for a missing bound
    label = model.role.label
    if model.role is Role.TEACHER and model.stored is not None:
        label = f"{label} ({model.stored.folder})"
    raise ValueError(f"--seq-length {length} is longer than {label} takes ({positions} positions); lower it")


def check_splits(model: Model) -> None:
    """Refuse parallel sizes that do not divide the model or its sequences.

    Raises:
        ValueError: names both numbers and the remedy.
    """
    args, label = model.args, model.role.label
    tensor, stages = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    if args.num_layers is None or args.num_attention_heads is None:
        return  # Megatron's own message names these well
    _check_sequence(args)
    layout = str(args.pipeline_model_parallel_layout)
    if re.search(r"\d{6}", layout):
        raise ValueError(
            f"--pipeline-model-parallel-layout {layout}: at most 99999 of one kind in a row; lower it"
        )
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    if args.num_attention_heads % tensor or (groups % tensor and tensor % groups):
        raise ValueError(
            f"--tensor-model-parallel-size {tensor} does not divide {label}'s {args.num_attention_heads} attention "
            f"heads in {groups} query groups: use one that does"
        )
    is_cut = model.role is Role.TEACHER or any(  # a teacher is cut evenly, whatever the flags say
        (
            args.pipeline_model_parallel_layout,
            args.decoder_first_pipeline_num_layers,
            args.decoder_last_pipeline_num_layers,
            args.num_virtual_stages_per_pipeline_rank,
            args.num_layers_per_virtual_pipeline_stage,
        )
    )
    if stages > args.num_layers and not is_cut:
        raise ValueError(
            f"--pipeline-model-parallel-size {stages}: {label} has only {args.num_layers} layers; lower it"
        )
    if stages > 1 and args.num_layers % stages and not is_cut:
        raise ValueError(
            f"--pipeline-model-parallel-size {stages} does not divide {label}'s {args.num_layers} layers: say how "
            f"to cut them, for example --pipeline-model-parallel-layout '{even_layout(args.num_layers, stages)}'"
        )


def _check_sequence(args: argparse.Namespace) -> None:
    """Refuse a sequence length that the ranks sharing a sequence cannot divide."""
    tensor = args.tensor_model_parallel_size if args.sequence_parallel else 1
    context = args.context_parallel_size
    factors = []
    if context > 1:
        factors.append(f"twice --context-parallel-size {context}")
    if tensor > 1:
        factors.append(f"--tensor-model-parallel-size {tensor} (for --sequence-parallel)")
    divisor = (2 * context if context > 1 else 1) * tensor
    if args.seq_length % divisor:
        below = args.seq_length // divisor * divisor
        raise ValueError(
            f"--seq-length {args.seq_length} is not a multiple of {' times '.join(factors)}: "
            f"use {' or '.join(str(length) for length in (below, below + divisor) if length)}"
        )
