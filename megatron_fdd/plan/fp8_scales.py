"""The scales of delayed scaling in a checkpoint: are they there, can they be read, do they go to the right experts."""

from __future__ import annotations

import os
import warnings

from megatron_fdd.host.checkpoint import holds_weights, read_extra_states
from megatron_fdd.plan.context import Context, Model, StoredModel
from megatron_fdd.step.teacher.arguments import uses_delayed_scaling

# How TransformerEngine names a module's scales in the bytes of its extra state.
_MARK = b"scale_fwd"
# TransformerEngine (2.20) unpickles extra state only where this is 1.
_TRUST = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"


def warn_of_pickled_scales(context: Context) -> None:
    """Warn of a run with delayed scaling that lacks what it needs to go on from its own checkpoint."""
    args = context.args
    if (
        args.rank == 0
        and uses_delayed_scaling(args)
        and args.save is not None
        and os.environ.get(_TRUST) != "1"
    ):
        warnings.warn(
            f"--fp8-recipe delayed (the default): to go on from a checkpoint of this run set {_TRUST}=1, or choose the "
            "recipe tensorwise, blockwise or mxfp8, which store no scales",
            stacklevel=2,
        )


def check_student_scales(context: Context) -> None:
    """Refuse a student's checkpoint that TransformerEngine's modules will not take, in whatever precision they run.

    Raises:
        ValueError: it was trained with delayed scaling, and TransformerEngine has not been told to trust it, or
            Megatron would give scales to other experts.
    """
    stored = context.stored_student
    if stored is None or context.args.transformer_impl != "transformer_engine":
        return
    if _holds_scales(stored):
        _check_trusted(stored)
        _check_expert_scales(context.student, stored)


def check_teacher_scales(teacher: Model) -> None:
    """Refuse scales of the teacher's that are missing, that are not trusted, or that would go to other experts.

    A checkpoint without weights passes; it is enough to plan with. No collectives.

    Raises:
        ValueError: it has no scales, reading them is not allowed, or Megatron would give them to other experts.
    """
    stored = teacher.stored
    if (
        stored is None
        or not uses_delayed_scaling(teacher.args)
        or not holds_weights(stored.path, stored.flag)
    ):
        return
    if not _holds_scales(stored):
        raise ValueError(
            f"--teacher-fp8-recipe delayed: {stored.path} holds no scales (a run with --fp8-recipe delayed "
            "saves them), and without gradients TransformerEngine never finds any; use tensorwise, blockwise or mxfp8"
        )
    _check_trusted(stored)
    _check_expert_scales(teacher, stored)


def _check_expert_scales(model: Model, stored: StoredModel) -> None:
    """Refuse to give experts the scales of others.

    What Megatron (0.19.2) stores for one of several experts that a module multiplies together are scales of other
    experts and other tensors too, which only a module of as many experts puts in order again.

    Args:
        stored: its checkpoint, which holds scales.

    Raises:
        ValueError: there are more experts to a rank, or fewer, than in training.
    """
    args, role = model.args, model.role
    if not (uses_delayed_scaling(args) and args.num_experts and args.moe_grouped_gemm):
        return
    wanted, given = stored.args.expert_model_parallel_size, args.expert_model_parallel_size
    if given != wanted:
        raise ValueError(
            f"FP8 with recipe delayed for {role.label}: its checkpoint was trained with expert-parallel size {wanted}; "
            f"at {given} Megatron gives experts the scales of others; use {role.experts_flag} {wanted}, or the recipe "
            "tensorwise, blockwise or mxfp8"
        )


def _check_trusted(stored: StoredModel) -> None:
    """Refuse a checkpoint with scales of delayed scaling that TransformerEngine has not been told to trust."""
    if os.environ.get(_TRUST) != "1":
        raise ValueError(
            f"{stored.flag}: the scales of delayed scaling in {stored.path} are pickled, and unpickling can run code; "
            f"if you trust the checkpoint, set {_TRUST}=1, without which TransformerEngine refuses to load them"
        )


def _holds_scales(stored: StoredModel) -> bool:
    """Whether a checkpoint has scales of delayed scaling; other recipes store none.

    Raises:
        ValueError: its index cannot be read.
    """
    return any(_MARK in state for state in read_extra_states(stored.path, stored.flag))
