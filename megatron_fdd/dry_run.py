"""The plan of a run, as `--fdd-dry-run` prints it: pairs, who holds what, and estimated memory."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megatron_fdd.config import FddConfig
from megatron_fdd.layer_plan import LayerPair, Plan

_MIB = 2**20


def describe_plan(plan: Plan, args: argparse.Namespace, teacher: argparse.Namespace | None) -> str:
    """The plan as text: one line a fact, memory in MiB per rank.

    Args:
        args: the student's (this run's) validated arguments.
        teacher: the teacher's, None without one.
    """
    lines = ["Feature dynamics distillation: plan", *_weights(plan.config)]
    lines += _pairs(plan.config, plan.pairs)
    lines += _ranks(plan, args)
    lines += _memory(plan.config, plan.pairs, args, teacher)
    return "\n".join(lines)


def _weights(config: FddConfig) -> list[str]:
    return [
        f"  loss = {config.kd_weight:g} kd ({config.kd_divergence}) + {config.alpha:g} trajectory "
        f"({config.trajectory_divergence}) + {config.beta:g} delta ({config.delta}) "
        f"+ {config.ce_weight:g} cross-entropy; tokens: {config.tokens}; temperature {config.temperature:g}; "
        f"lens: norm {config.lens_norm}, head {config.lens_head}"
    ]


def _pairs(config: FddConfig, pairs: Sequence[LayerPair]) -> list[str]:
    if not pairs:
        return ["  no inner layers: alpha and beta are 0"]
    rule = config.layer_rule if config.layer_pairs is None else "given"
    return [f"  layer pairs ({rule}), output of block, student <- teacher:"] + [
        f"    {pair.student_block} <- {pair.teacher_block}" for pair in pairs
    ]


def _ranks(plan: Plan, args: argparse.Namespace) -> list[str]:
    tensor, stages = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    shard = args.padded_vocab_size // tensor
    lines = [
        f"  {args.world_size} rank(s) = tensor {tensor} x pipeline {stages} x data {args.data_parallel_size}, "
        f"sequence parallel {'on' if args.sequence_parallel else 'off'}; of each head:"
    ]
    for rank in range(tensor):
        first, last = rank * shard, min((rank + 1) * shard, plan.vocab_size)
        held = f"vocabulary {first}..{last - 1}" if first < last else "padding only"
        lines.append(f"    tensor rank {rank}: {held}, {shard} rows with padding")
    first_layer = 0
    for stage, (chunk, count) in enumerate(zip(plan.chunks, plan.student_layers, strict=True)):
        taps = ", ".join(plan.pairs[index].name for index in chunk.pairs) or "nothing"
        carried = "" if chunk.carry_out is None else f"; sends on {plan.pairs[chunk.carry_out].name}"
        heads = "; holds both heads" if chunk.is_last or chunk.pairs else ""
        lines.append(
            f"    stage {stage}: student blocks {first_layer + 1}..{first_layer + count}, taps {taps}{heads}{carried}"
        )
        first_layer += count
    return lines


def _memory(
    config: FddConfig,
    pairs: Sequence[LayerPair],
    args: argparse.Namespace,
    teacher: argparse.Namespace | None,
) -> list[str]:
    tensor = args.tensor_model_parallel_size
    token_rows = args.seq_length * args.micro_batch_size // (tensor if args.sequence_parallel else 1)
    bytes_each = 2 if args.bf16 or args.fp16 else 4
    student_width = args.hidden_size
    figures = {"student head": args.padded_vocab_size // tensor * student_width * bytes_each}
    if teacher is not None:
        teacher_width = teacher.hidden_size
        figures["teacher weights"] = count_parameters(teacher) // tensor * bytes_each
        figures["  of these its head"] = args.padded_vocab_size // tensor * teacher_width * bytes_each
        figures["taps of one micro-batch, both models, float32"] = (
            len(pairs) * token_rows * (teacher_width + student_width) * 4
        )
        # Two [N, d_S] gradients a tap from the forward pass, kept until the backward pass.
        gradients = 2 if config.beta > 0 and config.delta == "logprob" else 1
        figures["gradients kept from the forward pass, float32"] = (
            gradients
            * len(pairs)
            * token_rows
            * (tensor if args.sequence_parallel else 1)
            * student_width
            * 4
        )
        if config.beta > 0:
            figures["Gram matrices, float32"] = 4 * (
                teacher_width**2 + teacher_width * student_width + student_width**2
            )
    return ["  estimated memory per rank, MiB:"] + [
        f"    {name}: {size / _MIB:.1f}" for name, size in figures.items()
    ]


def count_parameters(args: argparse.Namespace) -> int:
    """Parameters of the GPT that these arguments describe: matrices and embeddings; norms are left out."""
    heads = args.num_attention_heads
    head_width = args.kv_channels or args.hidden_size // heads
    groups = args.num_query_groups if args.group_query_attention else heads
    attention = args.hidden_size * head_width * (2 * heads + 2 * groups)
    feed_forward = args.hidden_size * args.ffn_hidden_size * (3 if args.swiglu else 2)
    embeddings = args.padded_vocab_size * args.hidden_size
    return args.num_layers * (attention + feed_forward) + embeddings * (
        2 if args.untie_embeddings_and_output_weights else 1
    )
