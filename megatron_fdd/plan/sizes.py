"""The size of a model on one rank: its parameters, and Megatron's estimate of the memory for training the student."""

from __future__ import annotations

import argparse
import copy

from megatron.training.theoretical_memory_usage import (
    compute_activation_memory,
    compute_activation_memory_without_sp,
    compute_weight_and_optimizer_memory,
)

from megatron_fdd.plan.model_shape import ModelShape, ParallelSizes


def held_parameters(args: argparse.Namespace, stage: int = 0) -> int:
    """Count the parameters of a GPT on a rank of a stage, from its arguments; the first stage is the fullest.

    They are matrices and embeddings, the head's only if there is one stage; norms are left out. A rank holds only its
    expert-parallel share of the experts; mixed layers count as their mean.
    """
    shape, sizes = ModelShape.of_args(args), ParallelSizes.of_args(args)
    has_head = args.untie_embeddings_and_output_weights and sizes.pipeline == 1
    embeddings = ((stage == 0) + has_head) * args.padded_vocab_size * shape.hidden
    layers = shape.matrix_parameters(range(shape.num_layers), sizes) + shape.router_parameters
    held = len(stage_layers(args, stage))
    return layers * held // shape.num_layers + embeddings // sizes.tensor


def stage_layers(args: argparse.Namespace, stage: int) -> range:
    """Return the layers of a stage if stages are cut evenly, first ones fuller, like a teacher's."""
    each, more = divmod(args.num_layers, args.pipeline_model_parallel_size)
    first = stage * each + min(stage, more)
    return range(first, first + each + (stage < more))


def student_bytes(args: argparse.Namespace, micro_batches: int, stage_layers: int) -> dict[str, int]:
    """Estimate the bytes of the student on the fullest rank, by purpose.

    Megatron's estimates count bf16 weights, float32 gradients, a float32 Adam, and attention that keeps no scores.
    They do not know full recompute; with it, every layer's input and one layer at work are counted here.

    Args:
        args: the student's validated arguments.
        micro_batches: number of micro-batches of a step on each data-parallel replica.
        stage_layers: number of layers of the stage that holds most.
    """
    args = copy.copy(args)  # Megatron's function writes to it: it fills in query groups
    if not isinstance(args.moe_layer_freq, list):  # a list has one entry for each layer
        args.num_layers = stage_layers * args.pipeline_model_parallel_size  # Megatron assumes equal stages
    args.data_parallel_size *= args.context_parallel_size  # all these ranks share the optimizer's state
    weights = compute_weight_and_optimizer_memory(args)
    args.seq_length //= args.context_parallel_size
    args.padded_vocab_size = 0  # no logits are formed
    kept = _kept_everywhere(args, micro_batches)
    kind = "as Megatron estimates"
    if args.recompute_granularity == "full":
        kept, kind = _kept_under_full_recompute(args, kept), "full recompute"
    return {
        "student weights, gradients and optimizer": int(weights),
        f"student activations, {kind}": int(kept),
    }


def _kept_everywhere(args: argparse.Namespace, micro_batches: int) -> float:
    """Estimate the bytes of every layer's activations, for all micro-batches in flight."""
    # Megatron's own report chooses between the two in this way.
    if args.sequence_parallel and args.recompute_granularity == "selective":
        return compute_activation_memory(args, micro_batches)
    return compute_activation_memory_without_sp(args, micro_batches)


def _kept_under_full_recompute(args: argparse.Namespace, kept_bytes: float) -> float:
    """Estimate the bytes kept: with `block` Megatron recomputes so many layers of each chunk, with `uniform` all."""
    layers = args.num_layers
    chunks = args.pipeline_model_parallel_size * (args.virtual_pipeline_model_parallel_size or 1)
    recomputed = (
        min(layers, args.recompute_num_layers * chunks) if args.recompute_method == "block" else layers
    )
    rows = args.seq_length * args.micro_batch_size
    rows //= args.tensor_model_parallel_size if args.sequence_parallel else 1
    inputs = rows * args.hidden_size * args.params_dtype.itemsize
    return recomputed * inputs + kept_bytes * max(layers - recomputed, 1) / layers
