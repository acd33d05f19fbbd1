"""The teacher's checkpoint: its place, and the check that this version can run the model in it."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_fdd.config import FddConfig
from megatron_fdd.host.checkpoint import check_no_spec
from megatron_fdd.host.like_flags import READ_HERE, READ_TO_BUILD, check_like_flags
from megatron_fdd.losses.terms import needs_of
from megatron_fdd.plan.context import Context, StoredModel
from megatron_fdd.step.teacher.arguments import is_teachers_own


def find_teacher(config: FddConfig, defaults: Mapping[str, object]) -> StoredModel | None:
    """Look for the teacher's checkpoint; return None if no term needs a teacher.

    Args:
        defaults: the parser's default of every flag.

    Raises:
        ValueError: there is no checkpoint, it is incomplete, or its arguments describe no model.
    """
    if not needs_of(config).teacher or config.teacher_load is None:
        return None
    model = StoredModel.find(config.teacher_load, "--teacher-load", to_plan=config.dry_run)
    read = READ_HERE | set(filter(is_teachers_own, READ_TO_BUILD))
    check_like_flags(model.args, defaults, f"{model.flag} {model.path}", read)
    return model


def check_teacher_model(context: Context) -> None:
    """Refuse a teacher that this version cannot run.

    Raises:
        ValueError: the model is not a GPTModel, has a cap without a family, or its layers are code to import.
    """
    if context.stored_teacher is None:
        return
    stored = context.stored_teacher.args
    check_no_spec(stored, "--teacher-load", "give its layers a family (docs/extend/family.md)")
    if getattr(stored, "hybrid_layer_pattern", None) is not None:
        raise ValueError("--teacher-load: only GPTModel offers taps; this teacher has a hybrid layer pattern")
    if getattr(stored, "final_logit_softcapping", None) is not None:
        raise ValueError(
            f"--teacher-load: a soft-capped head (final_logit_softcapping {stored.final_logit_softcapping:g}): the "
            "losses know a cap from the model's family alone; import the model with `fdd import`, or add its family "
            "(docs/extend/family.md)"
        )
