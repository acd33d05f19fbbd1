"""The preparation of a run: everything that is decided before any process group exists."""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.arguments import validate_args
from megatron.training.global_vars import set_global_variables

from megatron_fdd.config import FddConfig
from megatron_fdd.data.token_ids import check_all_token_ids
from megatron_fdd.host import console
from megatron_fdd.host.checkpoint import check_objects_together
from megatron_fdd.host.disk import explain
from megatron_fdd.host.file_sums import check_sums
from megatron_fdd.host.layer_specs import logit_cap
from megatron_fdd.host.model import chunk_layers, planned_config
from megatron_fdd.host.panics import panics_as_errors
from megatron_fdd.host.unpickling import restrict_unpickling, trust_checkpoints
from megatron_fdd.losses.layer_plan import Plan
from megatron_fdd.losses.pairs import LayerPair, plan_pairs
from megatron_fdd.losses.terms import uses_taps
from megatron_fdd.plan import checks
from megatron_fdd.plan.command_line import parse_command_line
from megatron_fdd.plan.context import Context, TeacherSize
from megatron_fdd.plan.megatron_errors import megatrons_errors
from megatron_fdd.plan.resumption import saved_groups
from megatron_fdd.plan.student_arguments import complete_student_args, force_values
from megatron_fdd.plan.teacher_checkpoint import find_teacher
from megatron_fdd.plan.teacher_store import find_stores, plan_stores
from megatron_fdd.plan.term_parameters import fresh_parameters
from megatron_fdd.plan.vocabulary import common_vocab_size, id_holders, set_vocab_size
from megatron_fdd.step.teacher.arguments import teacher_args
from megatron_fdd.step.teacher.stored import PlannedStore


@dataclass(frozen=True, slots=True)
class PreparedRun:
    """A checked command line.

    Attributes:
        args: arguments of the student and the run, validated by Megatron and set as its globals.
        teacher: arguments to build the teacher with; None if every weight that needs a teacher is 0, and with a store.
        teacher_stores: the features of one teacher or several on disk; none without.
        teacher_size: of the teacher, or of the first.
        checkpoints: the checkpoints that the run reads, by the flags that name them.
        id_holders: the number of ids of each holder of a vocabulary, by its name; none if no data of ours is read.
        fresh: names of parameters of terms that the student's checkpoint lacks.
        saved_groups: the groups of parameters of the checkpoint's optimizer; none if the run makes a new one.
        stop_at_nan: whether Megatron's `--no-check-for-nan-in-loss-and-grad` is left out.
    """

    plan: Plan
    args: argparse.Namespace
    teacher: argparse.Namespace | None
    teacher_checkpoint: Path | None
    teacher_stores: tuple[PlannedStore, ...]
    teacher_size: TeacherSize | None
    checkpoints: dict[str, Path]
    id_holders: Mapping[str, int]
    fresh: frozenset[str]
    saved_groups: tuple[Mapping[str, Any], ...]
    stop_at_nan: bool

    @property
    def config(self) -> FddConfig:
        """The config of the plan."""
        return self.plan.config

    def check_files(self) -> None:
        """Refuse files that only reading them whole can tell to be wrong, each rank its share, before any is loaded.

        They are objects in checkpoints, the checkpoints' files by their sums, and the ids of the data.

        Collectives over all ranks: those of `check_objects_together`, `check_sums` and `check_all_token_ids`.

        Raises:
            ValueError: a check refuses, or a file cannot be read. The same on every rank.
        """
        try:
            check_objects_together(self.checkpoints)
            if self.checkpoints:
                console.say(check_sums(self.checkpoints, skip=self.config.skip_checksums))
            if self.id_holders:
                check_all_token_ids(self.args, self.id_holders)
        except OSError as error:  # the same on every rank
            raise ValueError(f"a file cannot be read: {explain(error)}; make it readable") from error


def prepare_run(*, checks_data: bool = True) -> PreparedRun:
    """Read `sys.argv`, and check everything that can be checked without communication.

    Args:
        checks_data: whether the datasets are ours, made from the files that flags name.

    Raises:
        ValueError: names the value and the remedy.
    """
    args, defaults = parse_command_line()
    config = FddConfig.from_args(args)
    if config.trust_checkpoint:
        trust_checkpoints()
    restrict_unpickling()
    # Megatron prints a thousand lines of arguments; a dry run should print only the plan.
    with contextlib.redirect_stdout(io.StringIO()) if config.dry_run else contextlib.nullcontext():
        return _prepare(Context(config, args, checks_data=checks_data), defaults)


def _prepare(known: Context, defaults: Mapping[str, object]) -> PreparedRun:
    """Extend what is known, from the command line to the plan, and make each phase of checks on the way."""
    config, args = known.config, known.args
    make_checks = partial(checks.make_checks, to_plan=config.dry_run)

    make_checks(checks.BEFORE_MEGATRON, known)
    known = replace(known, stored_student=complete_student_args(args, defaults))
    stop_at_nan = args.check_for_nan_in_loss_and_grad
    force_values(args)
    make_checks(checks.OF_EACH_MODEL, known.student)
    make_checks(checks.WITH_STUDENT, known)

    with (
        megatrons_errors("these flags"),
        panics_as_errors(f"--tokenizer-model {args.tokenizer_model} is damaged, copy it again"),
    ):
        validate_args(args, {})
        set_global_variables(args)
        student = planned_config(args)
    set_vocab_size(args)
    make_checks(checks.AFTER_MEGATRON, known)

    known = replace(known, stored_teacher=find_teacher(config, defaults), teacher_stores=find_stores(known))
    known = replace(known, id_holders=id_holders(known))
    make_checks(checks.WITH_STORED_TEACHER, known)
    if known.stored_teacher is not None:
        size = config.teacher_expert_model_parallel_size
        known = replace(known, teacher_args=teacher_args(known.stored_teacher.args, args, expert_size=size))
    if known.teacher is not None:
        make_checks(checks.OF_EACH_MODEL, known.teacher)
        make_checks(checks.WITH_TEACHER, known.teacher)

    known = replace(known, plan=_plan(known, student))
    known = replace(known, planned_stores=plan_stores(known))
    make_checks(checks.OF_BOTH_MODELS, known)
    assert known.plan is not None
    teacher_path = None if known.stored_teacher is None else known.stored_teacher.path
    stored = (known.stored_student, known.stored_teacher)
    checkpoints = {model.flag: model.path for model in stored if model is not None}
    fresh, groups = fresh_parameters(known), saved_groups(known)
    return PreparedRun(
        plan=known.plan,
        args=args,
        teacher=known.teacher_args,
        teacher_checkpoint=teacher_path,
        teacher_stores=known.planned_stores,
        teacher_size=known.teacher_size,
        checkpoints=checkpoints,
        id_holders=known.id_holders,
        fresh=fresh,
        saved_groups=groups,
        stop_at_nan=stop_at_nan,
    )


def _plan(known: Context, student: TransformerConfig) -> Plan:
    """Pair the layers of both models and place them on the stages.

    Raises:
        ValueError: the pairs do not fit the models, or Megatron cannot cut the teacher by these flags.
    """
    args, size = known.args, known.teacher_size
    pairs: tuple[LayerPair, ...] = ()
    if size is not None and uses_taps(known.config):
        pairs = plan_pairs(known.config, args.num_layers, size.num_layers)
    with megatrons_errors("the teacher of these flags"):
        teacher = None if known.teacher_args is None else planned_config(known.teacher_args)
    return Plan(
        known.config,
        pairs,
        args.pipeline_model_parallel_size,
        chunk_layers(student),
        () if teacher is None else chunk_layers(teacher),
        common_vocab_size(known),
        args.padded_vocab_size,
        is_student_capped=logit_cap(student) is not None,
        is_teacher_capped=teacher is not None and logit_cap(teacher) is not None,
    )
