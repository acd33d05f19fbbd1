"""Checks of the scales of delayed scaling in a checkpoint: they exist, can be read, and go to the right experts."""

from __future__ import annotations

import os
import warnings

from megatron_fdd.host.checkpoint import holds_weights, read_extra_states
from megatron_fdd.plan.context import Context, Model, StoredModel
from megatron_fdd.step.teacher.arguments import uses_delayed_scaling

# TransformerEngine's name for a module's scales in the bytes of its extra state.
_MARK = b"scale_fwd"
# TransformerEngine (2.20) unpickles extra state only if this variable is 1.
_TRUST = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"


def warn_of_pickled_scales(context: Context) -> None:
    """Warn of a run with delayed scaling that could not continue from its own checkpoint."""
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
    """Refuse a student's checkpoint that TransformerEngine's modules cannot load, whatever precision they run in.

    Raises:
        ValueError: the student was trained with delayed scaling, and TransformerEngine is not set to trust it, or
            Megatron would give scales to the wrong experts.
    """
    stored = context.stored_student
    if stored is None or context.args.transformer_impl != "transformer_engine":
        return
    if _holds_scales(stored):
        _check_trusted(stored)
        _check_expert_scales(context.student, stored)


def check_teacher_scales(teacher: Model) -> None:
    """Refuse scales of the teacher that are missing, not trusted, or would go to the wrong experts.

    A checkpoint without weights passes, because it is enough for a plan. No collectives.

    Raises:
        ValueError: it has no scales, reading them is not allowed, or Megatron would give them to the wrong experts.
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
    """Refuse a layout at which experts would get the scales of others.

    Where a module multiplies several experts together, Megatron (0.19.2) stores for one expert also scales of other
    experts and other tensors. Only a module with the same number of experts reads them in the right order.

    Args:
        stored: the model's checkpoint, which holds scales.

    Raises:
        ValueError: a rank has more or fewer experts than in training.
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
    """Refuse a checkpoint with scales of delayed scaling that TransformerEngine is not set to trust."""
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
