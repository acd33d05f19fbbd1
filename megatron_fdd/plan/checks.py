"""The table of all checks of a run, by phase, in their order.

`plan/run.py` makes the checks of a phase as soon as the knowledge that they need exists:

| phase | new knowledge |
|---|---|
| `BEFORE_MEGATRON` | the parsed command line and the config; no value is completed yet |
| `OF_EACH_MODEL`, for the student | its architecture: a checkpoint has completed the arguments, values are forced |
| `WITH_STUDENT` | the same; the checks above have accepted its parallel sizes |
| `AFTER_MEGATRON` | Megatron has validated the arguments and built the tokenizer |
| `WITH_STORED_TEACHER` | the teacher as its checkpoint, or its store of features, describes it; all vocabularies |
| `OF_EACH_MODEL`, for the teacher | those arguments with this run's layout and precision; skipped without a teacher |
| `WITH_TEACHER` | the same |
| `OF_BOTH_MODELS` | the plan: layer pairs, layers of every chunk, the common vocabulary |

No process group exists yet, so no check communicates. Every rank makes all checks and meets the same first error. A
plan (`--fdd-dry-run`) can be made anywhere, and leaves out the checks with `needs_machine`. What only whole files can
tell is checked as soon as there is a process group, by all ranks together (`PreparedRun.check_files` in `plan/run.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_fdd.data.checks import check_data_args
from megatron_fdd.data.full_validation import check_full_validation
from megatron_fdd.data.index_cache import mend_cache
from megatron_fdd.data.tokenizer import check_tokenizer_files
from megatron_fdd.losses.terms import check_terms
from megatron_fdd.plan.context import Context, Model
from megatron_fdd.plan.experts import check_experts, check_resume
from megatron_fdd.plan.fp8 import check_fp8_device, check_fp8_shapes
from megatron_fdd.plan.fp8_scales import check_student_scales, check_teacher_scales, warn_of_pickled_scales
from megatron_fdd.plan.modules import (
    check_kernels,
    check_layers,
    check_local_attention,
    check_spec,
    check_ways,
    check_windows,
)
from megatron_fdd.plan.no_effect import warn_of_flags, warn_of_schedule
from megatron_fdd.plan.numbers import check_given, check_numbers, check_schedule, check_shares
from megatron_fdd.plan.parallel_sizes import check_length, check_splits
from megatron_fdd.plan.rates import warn_of_rate
from megatron_fdd.plan.recompute import check_recompute
from megatron_fdd.plan.refusals import check_refusals
from megatron_fdd.plan.resumption import check_resumption
from megatron_fdd.plan.same_teachers import note_teachers
from megatron_fdd.plan.save_folder import check_models_kept, check_nothing_lost
from megatron_fdd.plan.student_arguments import check_same_model
from megatron_fdd.plan.teacher_checkpoint import check_teacher_model
from megatron_fdd.plan.teacher_store import check_store, check_stream, check_teachers
from megatron_fdd.plan.term_parameters import check_term_parameters, warn_of_left_out_terms
from megatron_fdd.plan.vocabulary import (
    check_data_ids,
    check_student_tokenizer,
    check_teacher_tokenizer,
    check_vocabularies,
)
from megatron_fdd.plan.written_files import check_folders, check_metrics_place, make_folders
from megatron_fdd.step.teacher.lens_file import LensFile, TeacherIdentity
from megatron_fdd.step.teacher.tap_format import TapFormat


@dataclass(frozen=True, slots=True)
class Check[Known]:
    """One row of the table: a function that raises a ValueError, or warns.

    Attributes:
        needs_machine: whether it uses this machine's GPU, or writes to its disks.
    """

    function: Callable[[Known], None]
    needs_machine: bool = False


def make_checks[Known](phase: Sequence[Check[Known]], known: Known, *, to_plan: bool) -> None:
    """Make the checks of a phase in their order.

    Args:
        to_plan: whether to leave out the checks that need the machine of the training.

    Raises:
        ValueError: the first check that refuses raises it.
    """
    for check in phase:
        if not (to_plan and check.needs_machine):
            check.function(known)


def _check_tokenizer_files(context: Context) -> None:
    """Refuse a tokenizer whose files do not exist."""
    check_tokenizer_files(context.args.tokenizer_type, context.args.tokenizer_model)


def _check_data(context: Context) -> None:
    """Refuse data that the run cannot read or learn from, unless the training script brings its own."""
    if context.checks_data:
        check_data_args(context.args)


def _check_full_validation(context: Context) -> None:
    """Refuse a validation of whole sets that Megatron cannot run, whoever brings the data."""
    check_full_validation(context.args)


def _mend_cache(context: Context) -> None:
    """Remove what a killed run left of the data's index."""
    if context.checks_data:
        mend_cache(context.args)


def _check_teacher_lens(context: Context) -> None:
    """Refuse a lens file of another teacher, without the blocks that are compared, or with a number like NaN."""
    path, plan, teacher = context.config.teacher_lens, context.plan, context.teacher
    assert plan is not None, "the phase is made when it is known"
    if path is None or not plan.pairs:
        return
    identity = None
    if context.teacher_stores:  # one: `check_teachers`
        known = context.teacher_stores[0].store.identity
        identity = TeacherIdentity(known.num_layers, known.hidden_size, known.final_norm)
    elif teacher is not None and teacher.stored is not None:
        identity = TeacherIdentity.read(teacher.stored.path, teacher.args)
    if identity is not None:
        LensFile.open(path).check(identity, {pair.teacher_block for pair in plan.pairs})


def _check_tap_width(context: Context) -> None:
    """Refuse a teacher whose hidden states do not fit the format of its taps."""
    plan, teacher = context.plan, context.teacher_args
    assert plan is not None, "the phase is made when it is known"
    if plan.pairs and teacher is not None:
        form = context.config.tap_dtype
        TapFormat(context.args.params_dtype, form).check_width(teacher.hidden_size, f"--fdd-tap-dtype {form}")


def _check_terms(context: Context) -> None:
    """Refuse terms that cannot be computed."""
    check_terms(context.config)


BEFORE_MEGATRON: tuple[Check[Context], ...] = (
    Check(_check_terms),
    Check(check_teachers),
    Check(check_refusals),
    Check(check_given),
    Check(check_numbers),
    Check(check_schedule),
    Check(check_models_kept),
    Check(check_shares),
    Check(check_nothing_lost),
    Check(check_kernels),
    Check(check_spec, needs_machine=True),  # it may import what a planning machine lacks
)
# The checks of FP8 and experts rely on the sizes that `check_splits` has accepted.
OF_EACH_MODEL: tuple[Check[Model], ...] = (
    Check(check_layers),
    Check(check_length),
    Check(check_splits),
    Check(check_local_attention),
    Check(check_windows),
    Check(check_ways),
    Check(check_fp8_shapes),
    Check(check_fp8_device, needs_machine=True),
    Check(check_experts),
)
WITH_STUDENT: tuple[Check[Context], ...] = (
    Check(check_resume),
    Check(check_student_scales),
    Check(warn_of_pickled_scales),
    Check(check_metrics_place, needs_machine=True),
    Check(check_folders, needs_machine=True),
    Check(_check_tokenizer_files),  # before Megatron builds the tokenizer, which it would look for online
)
AFTER_MEGATRON: tuple[Check[Context], ...] = (
    Check(check_same_model),
    Check(_check_full_validation),
    Check(check_resumption),
    Check(_check_data),
    Check(_mend_cache, needs_machine=True),
    Check(check_student_tokenizer),
    Check(warn_of_flags),
    Check(warn_of_schedule),
    Check(warn_of_rate),
)
WITH_STORED_TEACHER: tuple[Check[Context], ...] = (
    Check(check_teacher_model),
    Check(check_teacher_tokenizer),
    Check(check_vocabularies),
    Check(check_data_ids),
)
WITH_TEACHER: tuple[Check[Model], ...] = (Check(check_teacher_scales),)
OF_BOTH_MODELS: tuple[Check[Context], ...] = (
    Check(check_recompute),
    Check(check_store),
    Check(check_stream),
    Check(note_teachers),
    Check(_check_teacher_lens),
    Check(_check_tap_width),
    Check(check_term_parameters),
    Check(warn_of_left_out_terms),
    Check(make_folders, needs_machine=True),  # the last one
)
PHASES = (
    BEFORE_MEGATRON,
    OF_EACH_MODEL,
    WITH_STUDENT,
    AFTER_MEGATRON,
    WITH_STORED_TEACHER,
    WITH_TEACHER,
    OF_BOTH_MODELS,
)
