"""What a model takes on one rank: its parameters, and Megatron's estimate of the memory for training the student."""

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
    """Parameters of the GPT that these arguments describe on a rank of a stage; the first one is the fullest.

    Matrices and embeddings, the head's only where there is one stage; norms are left out. Of its experts a rank holds
    those of its expert-parallel share; mixed layers count as their mean.
    """
    shape, sizes = ModelShape.of_args(args), ParallelSizes.of_args(args)
    has_head = args.untie_embeddings_and_output_weights and sizes.pipeline == 1
    embeddings = ((stage == 0) + has_head) * args.padded_vocab_size * shape.hidden
    layers = shape.matrix_parameters(range(shape.num_layers), sizes) + shape.router_parameters
    held = len(stage_layers(args, stage))
    return layers * held // shape.num_layers + embeddings // sizes.tensor


def stage_layers(args: argparse.Namespace, stage: int) -> range:
    """The layers of a stage where stages are cut evenly, first ones fuller, as a teacher's are."""
    each, more = divmod(args.num_layers, args.pipeline_model_parallel_size)
    first = stage * each + min(stage, more)
    return range(first, first + each + (stage < more))


def student_bytes(args: argparse.Namespace, micro_batches: int, stage_layers: int) -> dict[str, int]:
    """Bytes on the fullest rank, by what they are for.

    Megatron's estimates count bf16 weights, float32 gradients and a float32 Adam, and attention that keeps no
    scores; under full recompute, of which they know nothing, every layer's input and one layer at work are counted.

    Args:
        args: the student's, validated.
        micro_batches: of a step, on each data-parallel replica.
        stage_layers: of the stage that holds most.
    """
    args = copy.copy(args)  # Megatron's function fills in query groups
    if not isinstance(args.moe_layer_freq, list):  # which has as many entries as there are layers
        args.num_layers = stage_layers * args.pipeline_model_parallel_size  # it takes stages as equal
    args.data_parallel_size *= args.context_parallel_size  # all of them share the optimizer's state
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
    """Every layer's activations, those of all micro-batches in flight."""
    # As Megatron's report chooses between the two.
    if args.sequence_parallel and args.recompute_granularity == "selective":
        return compute_activation_memory(args, micro_batches)
    return compute_activation_memory_without_sp(args, micro_batches)


def _kept_under_full_recompute(args: argparse.Namespace, kept_bytes: float) -> float:
    """With `block` Megatron recomputes that many layers of each chunk only, with `uniform` all of them."""
    layers = args.num_layers
    chunks = args.pipeline_model_parallel_size * (args.virtual_pipeline_model_parallel_size or 1)
    recomputed = (
        min(layers, args.recompute_num_layers * chunks) if args.recompute_method == "block" else layers
    )
    rows = args.seq_length * args.micro_batch_size
    rows //= args.tensor_model_parallel_size if args.sequence_parallel else 1
    inputs = rows * args.hidden_size * args.params_dtype.itemsize
    return recomputed * inputs + kept_bytes * max(layers - recomputed, 1) / layers
