"""The plan of a run, as `--fdd-dry-run` prints it: pairs, the parts of each rank, and estimated memory."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from megatron_fdd.config import FddConfig
from megatron_fdd.host.rehearsal import is_wanted as is_rehearsal_wanted
from megatron_fdd.host.role import Role
from megatron_fdd.losses.layer_plan import Plan
from megatron_fdd.losses.pairs import LayerPair
from megatron_fdd.losses.term_modules import trained_parameters
from megatron_fdd.losses.terms import TERMS, needs_of, uses_taps
from megatron_fdd.ops.implementation import DEFAULT_IMPLEMENTATION, LARGE_GPU_BYTES, memory_of_gpu
from megatron_fdd.plan.balance import describe_balance
from megatron_fdd.plan.flops import token_flops
from megatron_fdd.plan.fp8 import frozen_weight_bytes, weight_copies_bytes
from megatron_fdd.plan.kept_gradients import kept_gradient_bytes
from megatron_fdd.plan.model_shape import ModelShape, ParallelSizes
from megatron_fdd.plan.sizes import student_bytes
from megatron_fdd.plan.teacher_store import describe_store, has_cap, store_bytes
from megatron_fdd.step.teacher.lens_file import LensFile
from megatron_fdd.step.teacher.stored import PlannedStore
from megatron_fdd.step.teacher.tap_format import TapFormat

_MIB = 2**20


def describe_plan(
    plan: Plan,
    args: argparse.Namespace,
    teacher: argparse.Namespace | None,
    stores: Sequence[PlannedStore] = (),
) -> str:
    """Write the plan as text, with one line for each fact and memory in MiB per rank.

    Args:
        args: the student's (this run's) validated arguments.
        teacher: the teacher's arguments; None without a teacher that runs.
        stores: the features of one teacher or several on disk.
    """
    plan = replace(
        plan, is_teacher_capped=plan.is_teacher_capped or any(has_cap(each.store) for each in stores)
    )
    widths = [each.store.identity.hidden_size for each in stores]
    widths += [] if teacher is None else [teacher.hidden_size]
    lines = ["Feature dynamics distillation: plan", *_weights(plan.config)]
    lines += [f"  plug-ins: {', '.join(plan.config.plugin)}"] if plan.config.plugin else []
    is_only = len(stores) <= 1
    lines += _pairs(plan.config, plan.pairs) if is_only else []
    for each in stores:
        lines += describe_store(args, each)
        lines += [] if is_only else _pairs(plan.config, each.plan.pairs, f" {each.named.name}")
    lines += _ranks(plan, args, [pair.name if is_only else f"s{pair.student_block}" for pair in plan.pairs])
    lines += _experts(args, Role.STUDENT) + ([] if teacher is None else _experts(teacher, Role.TEACHER))
    lines += _memory(plan, args, teacher, stores, widths)
    lines += _balance(plan, args, max(widths, default=None))
    return "\n".join(lines)


def _weights(config: FddConfig) -> list[str]:
    sampled = [] if config.sample_tokens == 1 else [f"{config.sample_tokens:g} of the tokens"]
    sampled += ["one random tap a step"] if config.sample_one_tap else []
    drawn = [f"  inner layers of a training step: {', '.join(sampled)}"] if sampled else []
    terms = []
    for term in TERMS:
        variant = term.variant(config)
        terms.append(f"{term.weight(config):g} {term.kind}" + (f" ({variant})" if variant else ""))
    return [
        f"  loss = {' + '.join(terms)}; tokens: {config.tokens}; temperature {config.temperature:g}; "
        f"lens: norm {config.lens_norm}, head {config.lens_head}",
        *_lens(config),
        *drawn,
    ]


def _lens(config: FddConfig) -> list[str]:
    if config.teacher_lens is None or not uses_taps(config):
        return []
    name = LensFile.open(config.teacher_lens).lens
    return [f"  lens of the teacher's inner layers: {name}, from {config.teacher_lens}"]


def _pairs(config: FddConfig, pairs: Sequence[LayerPair], teacher: str = "") -> list[str]:
    if not pairs:
        return ["  no inner layers: none of their terms has a weight"]
    rule = config.layer_rule if config.layer_pairs is None else "given"
    return [f"  layer pairs ({rule}), output of block, student <- teacher{teacher}:"] + [
        f"    {pair.student_block} <- {pair.teacher_block}" for pair in pairs
    ]


def _ranks(plan: Plan, args: argparse.Namespace, names: Sequence[str]) -> list[str]:
    """Return lines about each tensor-parallel rank and each stage. `names`: of the pairs."""
    tensor, stages = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    shard = args.padded_vocab_size // tensor
    lines = [
        f"  {args.world_size} rank(s) = tensor {tensor} x context {args.context_parallel_size} x pipeline {stages} x "
        f"data {args.data_parallel_size}, sequence parallel {'on' if args.sequence_parallel else 'off'}; each head:"
    ]
    for rank in range(tensor):
        first, last = rank * shard, min((rank + 1) * shard, plan.vocab_size)
        held = f"vocabulary {first}..{last - 1}" if first < last else "padding only"
        lines.append(f"    tensor rank {rank}: {held}, {shard} rows with padding")
    beyond = (getattr(args, "vocab_size", None) or 0) - plan.vocab_size
    if beyond > 0:
        lines.append(
            f"    {beyond:,} more row(s) of the student are no token of the tokenizer and of every model: no softmax "
            "here has them, an exported student does"
        )
    first_layer = 0
    for index, (chunk, count) in enumerate(zip(plan.chunks, plan.student_layers, strict=True)):
        stage = index % plan.num_stages
        taps = ", ".join(names[index] for index in chunk.pairs) or "nothing"
        carried = "" if chunk.carry_out is None else f"; sends on {names[chunk.carry_out]}"
        heads = "; holds both heads" if chunk.is_last or chunk.pairs else ""
        lines.append(
            f"    stage {stage}: student blocks {first_layer + 1}..{first_layer + count}, taps {taps}{heads}{carried}"
        )
        first_layer += count
    return lines


def _experts(args: argparse.Namespace, role: Role) -> list[str]:
    experts, sizes = ModelShape.of_args(args).experts, ParallelSizes.of_args(args)
    if experts is None:
        return []
    return [
        f"  experts of {role.label}: {experts.count} in each of {len(experts.layers)} layer(s), "
        f"{experts.top_k} to a token; {experts.count // sizes.expert} on a rank"
        + (f", cut {sizes.expert_tensor} ways" if sizes.expert_tensor > 1 else "")
    ]


def _memory(
    plan: Plan,
    args: argparse.Namespace,
    teacher: argparse.Namespace | None,
    stores: Sequence[PlannedStore],
    widths: Sequence[int],
) -> list[str]:
    """Return lines with the estimates for the stage that holds most, and their sum. `widths`: of all teachers."""
    figures = student_bytes(args, _micro_batches(args), _layers_of_fullest_stage(plan))
    if copies := weight_copies_bytes(args, plan.student_layers):
        figures["student weights, copies in FP8"] = copies
    if learned := _learned_bytes(plan, args, widths[0] if widths else None):
        figures["what terms learn, gradients and optimizer"] = learned
    figures["student head"] = (
        args.padded_vocab_size
        // args.tensor_model_parallel_size
        * (args.hidden_size * args.params_dtype.itemsize)
    )
    if teacher is not None:
        figures |= _teacher_bytes(plan, args, teacher)
    if stores:
        figures |= store_bytes(args, stores)
    if widths:
        figures |= _term_bytes(plan, args, widths)
    # With several stages, heads are copies.
    elsewhere = ("in host memory", "student head", "teacher head")[: 3 if plan.num_stages == 1 else 1]
    counted = [size for name, size in figures.items() if not any(part in name for part in elsewhere)]
    at_work = "" if teacher is None else "the teacher's layers at work, "
    return [
        "  estimated memory per rank, MiB:",
        *(f"    {name}: {size / _MIB:.1f}" for name, size in figures.items()),
        f"    sum: {sum(counted) / _MIB:.1f}",
        f"    (not included: {at_work}tokens sent to experts, communication, CUDA's own)",
    ]


def _learned_bytes(plan: Plan, args: argparse.Namespace, teacher_width: int | None) -> int:
    """Estimate the bytes of terms' parameters on the stage that holds most, counted like the student's."""
    if teacher_width is None:
        return 0
    widths = args.hidden_size, teacher_width
    stages = [
        [index for chunk in plan.chunks_on(stage) for index in chunk.pairs]
        for stage in range(plan.num_stages)
    ]
    most = max(trained_parameters(plan.config, pairs, widths) for pairs in stages)
    sharing = args.data_parallel_size * args.context_parallel_size if args.use_distributed_optimizer else 1
    return most * 6 + most * 12 // sharing


def _own_rows(args: argparse.Namespace) -> int:
    """Return the token rows of a micro-batch on this rank, outside the matrix products."""
    rows = args.seq_length // args.context_parallel_size * args.micro_batch_size
    return rows // (args.tensor_model_parallel_size if args.sequence_parallel else 1)


def _teacher_bytes(plan: Plan, args: argparse.Namespace, teacher: argparse.Namespace) -> dict[str, int]:
    """Estimate the bytes of a teacher that runs, on the stage that holds most."""
    config, tensor, stages = plan.config, args.tensor_model_parallel_size, plan.num_stages
    bytes_each, width = args.params_dtype.itemsize, teacher.hidden_size
    held = max(len(plan.teacher_pairs(stage)) for stage in range(stages))
    figures = {}
    figures["teacher weights"], in_fp8 = frozen_weight_bytes(teacher)
    if in_fp8:
        figures["teacher weights in FP8"] = in_fp8
    figures["teacher head (with one stage part of its weights)"] = (
        args.padded_vocab_size // tensor * width * bytes_each
    )
    if config.teacher_lens is not None and plan.pairs:
        sizes = LensFile.open(config.teacher_lens).num_bytes
        figures["teacher's lens, tensors of its blocks"] = max(
            sum(sizes[block] for block in plan.teacher_blocks(stage)) for stage in range(stages)
        )
    tap = TapFormat(args.params_dtype, config.tap_dtype if stages > 1 else "bf16")
    # Under a pipeline the teacher runs all micro-batches of a step first; otherwise one at a time.
    kept = _micro_batches(args) if stages > 1 else 1
    where = " in host memory" if config.offload_teacher_taps and stages > 1 else ""
    figures[f"teacher taps{where}, {held} x {kept} micro-batch(es)"] = (
        held * kept * _own_rows(args) * tap.token_bytes(width)
    )
    if stages > 1:
        figures[f"teacher's final hidden states{where}, {kept} micro-batch(es)"] = (
            kept * _own_rows(args) * width * bytes_each
        )
    return figures


def _term_bytes(plan: Plan, args: argparse.Namespace, teacher_widths: Sequence[int]) -> dict[str, int]:
    """Estimate the bytes of features, gradients, Gram matrices and logits on the stage that holds most.

    A row has the features of one teacher; Gram matrices are there for each.
    """
    config, width, needs = plan.config, args.hidden_size, needs_of(plan.config)
    rows = args.seq_length // args.context_parallel_size * args.micro_batch_size
    taps = max(sum(len(chunk.pairs) for chunk in plan.chunks_on(stage)) for stage in range(plan.num_stages))
    # A step uses a part of the rows; with one random tap, it uses the drawn tap and the one before it.
    looked_at = min(taps, 2) if config.sample_one_tap else taps
    own_drawn, drawn = (math.ceil(config.sample_tokens * each) for each in (_own_rows(args), rows))
    figures = {
        f"features of {looked_at} tap(s), both models, float32": (
            looked_at * own_drawn * (max(teacher_widths) + width) * 4
        )
    }
    figures["gradients kept from the forward pass, on a GPU"] = kept_gradient_bytes(
        plan, args, (own_drawn, drawn), _micro_batches(args)
    )
    head_rows = args.padded_vocab_size // args.tensor_model_parallel_size
    figures["logits of both models that exist at a time, on a GPU, float32"] = (
        2 * 4 * DEFAULT_IMPLEMENTATION.most_logits(rows, head_rows, gpu_bytes=_planned_gpu_bytes())
    )
    figures["placeholder of the head's gradient"] = head_rows * width * args.params_dtype.itemsize
    if needs.grams:
        figures["Gram matrices, float32"] = sum(
            4 * (each**2 + each * width + width**2) for each in teacher_widths
        )
        figures["Gram matrices in parts for products, on a GPU"] = figures["Gram matrices, float32"]
    return figures


def _planned_gpu_bytes() -> int:
    """Return the memory of this machine's GPU; without one, of a GPU that holds the most logits."""
    own = None if is_rehearsal_wanted() else memory_of_gpu(torch.device("cuda"))
    return LARGE_GPU_BYTES if own is None else own


def _layers_of_fullest_stage(plan: Plan) -> int:
    return max(sum(plan.student_layers[stage :: plan.num_stages]) for stage in range(plan.num_stages))


def _micro_batches(args: argparse.Namespace) -> int:
    return args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)


def _balance(plan: Plan, args: argparse.Namespace, teacher_width: int | None) -> list[str]:
    """Return lines with the load of each pipeline stage, with and without its taps, and a split that evens it out."""
    if plan.num_stages == 1:
        return []
    shape = replace(ModelShape.of_args(args, vocab=plan.vocab_size), is_capped=plan.is_student_capped)
    capped = plan.is_teacher_capped
    teachers = None if teacher_width is None else replace(shape, hidden=teacher_width, is_capped=capped)
    flops = token_flops(shape, teachers, plan.config)
    layers = [pair.student_layer for pair in plan.pairs]
    split = [plan.student_layers[stage :: plan.num_stages] for stage in range(plan.num_stages)]
    return describe_balance(flops, split, layers, _micro_batches(args))
