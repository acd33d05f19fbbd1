"""Checks of mixtures of experts: divisibility by the parallel sizes, and the resumption of an optimizer."""

from __future__ import annotations

import argparse

from megatron_fdd.host.role import Role
from megatron_fdd.plan.context import Context, Model
from megatron_fdd.plan.model_shape import ParallelSizes


def check_experts(model: Model) -> None:
    """Refuse parallel sizes over which a model's experts cannot be spread; Megatron refuses late, or without a remedy.

    Raises:
        ValueError: names the size, the bound and the remedy.
    """
    args, role = model.args, model.role
    label, flag, size = role.label, role.experts_flag, args.expert_model_parallel_size
    if not args.num_experts:
        if size > 1:
            other = f"; {Role.TEACHER.experts_flag} is for the teacher's" if role is Role.STUDENT else ""
            raise ValueError(f"{flag} {size}: {label} has no experts: leave it out{other}")
        return
    if size < 1 or args.num_experts % size:
        raise ValueError(
            f"{flag} {size} does not divide {label}'s {args.num_experts} experts: use one that does"
        )
    sizes = ParallelSizes.of_args(args)
    stages, expert_tensor = sizes.pipeline, sizes.expert_tensor
    ranks = args.world_size // stages
    if ranks % (size * expert_tensor):
        raise ValueError(
            f"{flag} {size}: {size} x expert tensor parallel {expert_tensor} does not divide the {ranks} rank(s) "
            f"of a pipeline stage (of {args.world_size} rank(s) in {stages} stage(s)): use a size that does, "
            "more ranks, or a lower --expert-tensor-parallel-size"
        )
    if args.add_bias_linear and expert_tensor > 1:
        remedy = " (or, for a new student, --disable-bias-linear)" if role is Role.STUDENT else ""
        raise ValueError(
            f"{label}'s experts have biases, which Megatron cannot cut {expert_tensor} ways: "
            f"use --expert-tensor-parallel-size 1{remedy}"
        )
    if role.is_trained:
        _check_training(args)


def _check_training(args: argparse.Namespace) -> None:
    """Refuse experts under tensor parallelism where Megatron cannot train them."""
    tensor = args.tensor_model_parallel_size
    if tensor > 1 and not args.sequence_parallel:
        raise ValueError(
            f"--num-experts with --tensor-model-parallel-size {tensor}: Megatron trains experts under tensor "
            "parallelism only with --sequence-parallel; give it too"
        )


def check_resume(context: Context) -> None:
    """Refuse to resume an optimizer whose state has other parts than the state of this layout.

    Raises:
        ValueError: experts had an optimizer of their own in the checkpoint and have none here, or the reverse.
    """
    args, stored = context.args, context.stored_student
    if stored is None or not context.resumes_optimizer:
        return
    there, here = _has_expert_optimizer(stored.args), _has_expert_optimizer(args)
    if there == here:
        return
    flag, sizes = Role.STUDENT.experts_flag, "of at least 2" if there else "1"
    raise ValueError(
        f"--load {stored.folder} was saved with {flag} {stored.args.expert_model_parallel_size}, this run has "
        f"{args.expert_model_parallel_size}: Megatron cannot resume across that, its optimizer has other parts. "
        f"Use {flag} {sizes}, or take the weights alone with --finetune"
    )


def _has_expert_optimizer(args: argparse.Namespace) -> bool:
    """Whether Megatron keeps experts in a separate optimizer, because their data-parallel ranks are others."""
    if not args.num_experts:
        return False
    sizes = ParallelSizes.of_args(args)
    return sizes.expert > 1 or sizes.expert_tensor != sizes.tensor
