"""Everything that is decided about a run before any process group exists."""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from megatron.training import get_tokenizer
from megatron.training.arguments import parse_args, validate_args
from megatron.training.global_vars import set_global_variables

from megatron_fdd.config import FddConfig, add_fdd_args
from megatron_fdd.data.checks import check_data_args
from megatron_fdd.data.pairing import check_checkpoint_tokenizer
from megatron_fdd.data.tokenizer import check_tokenizer_files
from megatron_fdd.host.checkpoint import find_checkpoint, read_checkpoint_args
from megatron_fdd.host.model import planned_layers
from megatron_fdd.host.process import is_first_rank
from megatron_fdd.host.role import Role
from megatron_fdd.losses.layer_plan import Plan
from megatron_fdd.losses.pairs import LayerPair, check_recompute_keeps_taps, plan_pairs
from megatron_fdd.losses.terms import uses_taps
from megatron_fdd.plan.checks import (
    check_approximations,
    check_given,
    check_kernels,
    check_local_attention,
    check_numbers,
    check_resume,
    check_schedule,
    check_splits,
    check_student_scales,
    check_writable,
)
from megatron_fdd.plan.experts import check_experts
from megatron_fdd.plan.fp8 import check_fp8_device, check_fp8_shapes, check_scales, warn_of_pickled_scales
from megatron_fdd.plan.refusals import refuse
from megatron_fdd.plan.save_folder import check_nothing_lost
from megatron_fdd.plan.student_arguments import (
    check_length,
    check_same_model,
    complete_student_args,
    force_values,
    student_checkpoint,
)
from megatron_fdd.step.metrics import check_metrics_file
from megatron_fdd.step.teacher.arguments import teacher_args, uses_delayed_scaling


@dataclass(frozen=True, slots=True)
class PreparedRun:
    """A checked command line.

    Attributes:
        args: the student's and the run's, validated by Megatron and set as its globals.
        teacher: arguments to build the teacher with; None when every weight that needs one is 0.
        stop_at_nan: Megatron's `--no-check-for-nan-in-loss-and-grad` was not given.
    """

    plan: Plan
    args: argparse.Namespace
    teacher: argparse.Namespace | None
    teacher_checkpoint: Path | None
    stop_at_nan: bool

    @property
    def config(self) -> FddConfig:
        return self.plan.config


def prepare_run() -> PreparedRun:
    """Read `sys.argv` and check all that can be wrong without talking to other ranks.

    Raises:
        ValueError: names the value and the remedy.
    """
    args, defaults = _parse()
    config = FddConfig.from_args(args)
    # Megatron prints a thousand lines of arguments; a dry run is for its plan.
    with contextlib.redirect_stdout(io.StringIO()) if config.dry_run else contextlib.nullcontext():
        return _check(args, defaults, config)


def _check(args: argparse.Namespace, defaults: dict[str, object], config: FddConfig) -> PreparedRun:
    refuse(args)
    check_given(args)
    check_numbers(args)
    check_schedule(args)
    check_nothing_lost(args)
    check_kernels(config.kernels)
    student = complete_student_args(args, defaults)
    stop_at_nan = args.check_for_nan_in_loss_and_grad
    force_values(args)
    check_length(args, Role.STUDENT.label, args.max_position_embeddings)
    check_splits(args, Role.STUDENT)
    check_local_attention(args, Role.STUDENT)
    check_fp8_shapes(args, Role.STUDENT)
    if not config.dry_run:  # a plan can be made anywhere
        check_fp8_device(args, Role.STUDENT)
    check_experts(args, Role.STUDENT)
    if student is not None:
        check_resume(args, student)
        check_student_scales(args, student)
    if args.rank == 0:
        warn_of_pickled_scales(args)
    if not config.dry_run:
        check_writable(config.metrics_file, "--fdd-metrics-file")
        check_metrics_file(config.metrics_file)
        check_writable(args.save, "--save")
    check_tokenizer_files(args.tokenizer_type, args.tokenizer_model)
    with _megatrons_errors("these flags"):
        validate_args(args, {})
        set_global_variables(args)
        student_layers = planned_layers(args)
    if student is not None:
        check_same_model(args, student)
    check_data_args(args)
    student_load, _ = student_checkpoint(args)
    if student_load is not None:
        check_checkpoint_tokenizer(Role.STUDENT, student_load, args)
    check_approximations(config, args.rank)
    stored, checkpoint = None, None
    if config.needs_teacher and config.teacher_load is not None:
        checkpoint = find_checkpoint(config.teacher_load, "--teacher-load", to_plan=config.dry_run)
        stored = read_checkpoint_args(checkpoint, "--teacher-load")
        refuse_teacher(stored)
        check_checkpoint_tokenizer(Role.TEACHER, config.teacher_load, args)
    vocab_size = _common_vocabulary(args, stored)
    teacher = None
    if stored is not None:
        teacher = teacher_args(stored, args, expert_size=config.teacher_expert_model_parallel_size)
        _check_teacher(teacher, args, config)
        if uses_delayed_scaling(teacher) and checkpoint is not None:
            check_scales(checkpoint, stored, teacher)
    pairs: tuple[LayerPair, ...] = ()
    if teacher is not None and uses_taps(config):
        pairs = plan_pairs(config, args.num_layers, teacher.num_layers)
    with _megatrons_errors("the teacher of these flags"):
        teacher_layers = () if teacher is None else planned_layers(teacher)
    recompute = (args.recompute_granularity, args.recompute_method, args.recompute_num_layers)
    check_recompute_keeps_taps([pair.student_layer for pair in pairs], student_layers, recompute)
    plan = Plan(
        config,
        pairs,
        args.pipeline_model_parallel_size,
        student_layers,
        teacher_layers,
        vocab_size,
        args.padded_vocab_size,
    )
    return PreparedRun(plan, args, teacher, checkpoint, stop_at_nan)


def _check_teacher(teacher: argparse.Namespace, args: argparse.Namespace, config: FddConfig) -> None:
    """What its arguments in this run can tell."""
    check_length(args, f"the teacher ({config.teacher_load})", teacher.max_position_embeddings)
    check_splits(teacher, Role.TEACHER)
    check_local_attention(teacher, Role.TEACHER)
    check_fp8_shapes(teacher, Role.TEACHER)
    if not config.dry_run:
        check_fp8_device(teacher, Role.TEACHER)
    check_experts(teacher, Role.TEACHER)


@contextlib.contextmanager
def _megatrons_errors(what: str) -> Iterator[None]:
    """How Megatron says that a flag or a file is wrong, as a ValueError."""
    try:
        yield
    except (AssertionError, ValueError, OSError) as error:
        raise ValueError(f"Megatron refuses {what}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The message, or where there is none the condition that Megatron asserts."""
    line = traceback.extract_tb(error.__traceback__)[-1].line or ""
    missing = re.fullmatch(r"assert args\.(\w+) is not None,?", line.strip())
    if missing and not str(error):
        return f"--{missing[1].replace('_', '-')} is missing"
    return str(error) or f"needed is {line.removeprefix('assert ')}"


def refuse_teacher(stored: argparse.Namespace) -> None:
    """Refuse a teacher that this version cannot run.

    Raises:
        ValueError: a model that is not a GPTModel with a linear head.
    """
    if getattr(stored, "hybrid_layer_pattern", None) is not None:
        raise ValueError("--teacher-load: only GPTModel offers taps; this teacher has a hybrid layer pattern")
    if getattr(stored, "final_logit_softcapping", None) is not None:
        raise ValueError(
            "--teacher-load: a soft-capped head is not linear, which Gram matrices and fused losses rely on; "
            "models of such a family cannot be distilled yet"
        )


def _parse() -> tuple[argparse.Namespace, dict[str, object]]:
    """Megatron's parser with ours; and the default of every flag."""
    defaults: dict[str, object] = {}

    def add_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        add_fdd_args(parser)
        for action in parser._actions:
            defaults.setdefault(action.dest, action.default)  # argparse takes the first, of several for one
            _refuse_empty(action)
        _mend_help(parser)
        # argparse would print its usage and exit on every rank; one error, by the same way as all others.
        parser.error = _argument_error  # type: ignore[method-assign]
        if not is_first_rank():
            parser.print_help = _print_nothing  # type: ignore[method-assign, assignment]
        return parser

    return parse_args(add_args), defaults


def _refuse_empty(action: argparse.Action) -> None:
    """Let a flag refuse an empty value by its name, which is what an unset variable of a shell leaves of one."""
    read = action.type
    if read in (int, float) or action.nargs == 0 or action.default == "":  # numbers do it themselves
        return

    def text(value: str) -> object:
        if not value:
            raise argparse.ArgumentTypeError(
                "its value is empty (an unset variable?); give one, or leave the flag out"
            )
        return read(value) if callable(read) else value

    text.__name__ = getattr(read, "__name__", "text")  # argparse puts it into its message
    action.type = text


def _mend_help(parser: argparse.ArgumentParser) -> None:
    """Escape the bare % in one of Megatron's help texts (0.19.2), on which `--help` would fail."""
    for action in parser._actions:
        try:
            _ = (action.help or "") % {**vars(action), "prog": parser.prog}
        except ValueError:
            action.help = str(action.help).replace("%", "%%")


def _print_nothing(_file: object = None) -> None:
    """Thousands of lines of help are enough once."""


def _argument_error(message: str) -> NoReturn:
    raise ValueError(f"{message} (see --help)")


def _common_vocabulary(args: argparse.Namespace, stored: argparse.Namespace | None) -> int:
    """Size of the vocabulary that tokenizer, student and teacher share.

    Raises:
        ValueError: the tokenizer has ids that the student has no embedding for, or the teacher lacks more of
            them than added tokens explain.
    """
    tokenizer_size = get_tokenizer().vocab_size
    args.vocab_size = args.vocab_size or min(tokenizer_size, args.padded_vocab_size)
    if tokenizer_size > args.vocab_size:
        raise ValueError(
            f"vocabulary mismatch: the tokenizer ({args.tokenizer_model or args.tokenizer_type}) has "
            f"{tokenizer_size} tokens, the student only {args.vocab_size} embeddings; "
            "use the tokenizer that the student was made with"
        )
    shared = min(tokenizer_size, args.vocab_size)
    if stored is None:
        return shared
    teacher_size = getattr(stored, "vocab_size", None) or stored.padded_vocab_size
    if teacher_size < max(tokenizer_size - _MAX_ADDED_TOKENS, tokenizer_size // 2):
        raise ValueError(
            f"vocabulary mismatch: the teacher has {teacher_size} tokens, the tokenizer "
            f"({args.tokenizer_model or args.tokenizer_type}) {tokenizer_size}; "
            "teacher and student must share a vocabulary"
        )
    return min(shared, teacher_size)


# More than this is no longer "tokens that were added to the same vocabulary".
_MAX_ADDED_TOKENS = 1024
