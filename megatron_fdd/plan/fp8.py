"""FP8 by TransformerEngine: the shapes that its products take, and the size of its copies of the weights."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megatron.core import fp8_utils

from megatron_fdd.plan.context import Model
from megatron_fdd.plan.model_shape import ModelShape, ParallelSizes
from megatron_fdd.plan.sizes import held_parameters, stage_layers

# Bytes of scales for each byte of FP8; tensorwise and delayed have one scale for each matrix.
_SCALES = {"mxfp8": 1 / 32, "blockwise": 4 / 128**2}


def fp8_layers(args: argparse.Namespace) -> range:
    """Return the layers that are computed in FP8; without FP8 the range is empty."""
    if not args.fp8:
        return range(0)
    if not args.first_last_layers_bf16:
        return range(args.num_layers)
    return range(args.num_layers_at_start_in_bf16, args.num_layers - args.num_layers_at_end_in_bf16)


def check_fp8_device(model: Model) -> None:
    """Refuse a recipe whose products this rank's GPU lacks, according to TransformerEngine. No collectives.

    Call after `check_refusals`, which guarantees TransformerEngine.

    Raises:
        ValueError: with TransformerEngine's reason.
    """
    args, role = model.args, model.role
    if not args.fp8:
        return
    manager = fp8_utils.FP8GlobalStateManager  # TransformerEngine's, which Megatron imports
    by_recipe = {"mxfp8": manager.is_mxfp8_available, "blockwise": manager.is_fp8_block_scaling_available}
    is_available, reason = by_recipe.get(args.fp8_recipe, manager.is_fp8_available)()
    if not is_available:
        raise ValueError(
            f"FP8 with recipe {args.fp8_recipe} for {role.label}: {reason} Use another recipe, or leave "
            f"{role.fp8_flag} out"
        )


def check_fp8_shapes(model: Model) -> None:
    """Refuse shapes that TransformerEngine's FP8 products would refuse in the first step.

    A product needs multiples of 16 in a dimension that it sums over, and multiples of 8 in any other; MXFP8 needs
    multiples of 32 in all. The forward pass sums over widths; the backward pass, which a frozen model does not have,
    sums over outputs and tokens. With sequence parallelism, tokens must also fit before they are gathered. Experts
    pad their tokens. The widths of multi-latent attention are not checked.

    Call after `check_splits`.

    Raises:
        ValueError: names every number that does not fit.
    """
    args, role = model.args, model.role
    if None in (args.num_layers, args.hidden_size, args.num_attention_heads) or not fp8_layers(args):
        return  # Megatron's own message names these well
    summed, other = (32, 32) if args.fp8_recipe == "mxfp8" else (16, 8)
    in_backward = summed if role.is_trained else other
    tokens = [
        f"{tokens} {name} (of {divisor})"
        for name, tokens, divisor in _tokens(args, in_backward, other)
        if tokens % divisor
    ]
    widths = [
        f"{name} {width} (of {divisor})"
        for name, width, divisor in _widths(args, summed, in_backward)
        if width % divisor
    ]
    if tokens or widths:
        flags = ["--seq-length, --micro-batch-size"] if tokens else []
        if widths and args.tensor_model_parallel_size > 1:
            flags.append("--tensor-model-parallel-size")
        remedy = f"leave {role.fp8_flag} out"
        if flags:
            remedy = f"change {', '.join(flags)}, or {remedy}"
        raise ValueError(
            f"FP8 with recipe {args.fp8_recipe} for {role.label}: not a multiple: {', '.join(tokens + widths)}. "
            f"{remedy.capitalize()}"
        )


def _tokens(args: argparse.Namespace, in_backward: int, other: int) -> list[tuple[str, int, int]]:
    """Return (name, number, divisor) of counts of tokens; packed sequences are one row of equally many tokens."""
    tokens = args.seq_length * args.micro_batch_size // args.context_parallel_size
    found = [("tokens of a micro-batch on a rank", tokens, in_backward)]
    if args.sequence_parallel:
        own = tokens // args.tensor_model_parallel_size
        found.append(("tokens of a micro-batch on a sequence-parallel rank", own, other))
    return found


def _widths(args: argparse.Namespace, summed: int, in_backward: int) -> list[tuple[str, int, int]]:
    """Return (name, number, divisor) of the widths of the matrices in FP8 layers."""
    shape, sizes, layers = ModelShape.of_args(args), ParallelSizes.of_args(args), fp8_layers(args)
    cut = f" / tensor parallel {sizes.tensor}"
    widths = [("hidden size", shape.hidden, summed)]
    if not args.multi_latent_attention:
        qkv = shape.qkv_width // sizes.tensor
        widths.append((f"attention width{cut}", shape.attention_width // sizes.tensor, summed))
        widths.append((f"width of queries, keys and values{cut}", qkv, in_backward))
    with_experts = set(shape.expert_layers).intersection(layers)
    if len(with_experts) < len(layers):
        widths.append((f"feed-forward width{cut}", shape.ffn // sizes.tensor, summed))
    if shape.experts is None or not with_experts:
        return widths
    name = f"experts' width / expert tensor parallel {sizes.expert_tensor}"
    widths.append((name, shape.experts.width // sizes.expert_tensor, summed))
    widths.append((f"shared experts' width{cut}", shape.experts.shared_width // sizes.tensor, summed))
    if args.moe_latent_size:
        widths.append(("experts' latent width", args.moe_latent_size, summed))
    return widths


def weight_copies_bytes(args: argparse.Namespace, counts: Sequence[int]) -> int:
    """Return the bytes of FP8 that TransformerEngine keeps beside a trained model's weights, on the fullest stage.

    They are for one rank, and for two copies: the backward pass reads a second one, which is transposed (before
    Blackwell) or, for MXFP8, scaled along columns.

    Args:
        args: the model's arguments.
        counts: number of layers of each chunk, in depth order; chunk c is on stage c % stages.
    """
    stages = args.pipeline_model_parallel_size
    held: list[list[int]] = [[] for _ in range(stages)]
    first = 0
    for chunk, count in enumerate(counts):
        held[chunk % stages] += [layer for layer in range(first, first + count) if layer in fp8_layers(args)]
        first += count
    shape, sizes = ModelShape.of_args(args), ParallelSizes.of_args(args)
    most = max(shape.matrix_parameters(layers, sizes) for layers in held)
    return int(2 * most * _bytes_each(args))


def frozen_weight_bytes(args: argparse.Namespace) -> tuple[int, int]:
    """Return the bytes of a frozen model's weights in its own precision, and in FP8, on a rank of the fullest stage.

    The matrices of FP8 layers exist only in FP8. `held_parameters` says which weights are counted.
    """
    layers = fp8_layers(args)
    matrices = ModelShape.of_args(args).matrix_parameters(layers, ParallelSizes.of_args(args))
    of_stages = []
    for stage in range(args.pipeline_model_parallel_size):
        count = len(set(layers).intersection(stage_layers(args, stage)))
        in_fp8 = matrices * count // max(len(layers), 1)
        others = held_parameters(args, stage) - in_fp8
        of_stages.append((others * args.params_dtype.itemsize, int(in_fp8 * _bytes_each(args))))
    return max(of_stages, key=sum)


def _bytes_each(args: argparse.Namespace) -> float:
    """Return the bytes of one weight in FP8, scales included."""
    return 1 + _SCALES.get(args.fp8_recipe, 0)
