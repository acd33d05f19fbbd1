"""The tokenizer and the vocabulary that run, student and teacher share."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Mapping

from megatron.training import get_tokenizer

from megatron_fdd.data.pairing import check_checkpoint_tokenizer, ids_of_tokenizer
from megatron_fdd.data.sources import open_sets
from megatron_fdd.data.token_ids import RUNS_TOKENIZER, SAMPLED_IDS, check_token_ids, unread_sets
from megatron_fdd.host.role import Role
from megatron_fdd.plan.context import Context

# A larger difference cannot be explained by tokens that were added to the same vocabulary.
_MAX_ADDED_TOKENS = 1024


def check_student_tokenizer(context: Context) -> None:
    """Refuse a student's checkpoint that was made with a tokenizer other than the run's."""
    if context.stored_student is not None:
        check_checkpoint_tokenizer(Role.STUDENT, context.stored_student.folder, context.args)


def check_teacher_tokenizer(context: Context) -> None:
    """Refuse a teacher that was made with a tokenizer other than the run's."""
    for teacher in context.known_teachers:
        check_checkpoint_tokenizer(Role.TEACHER, teacher.folder, context.args)


def set_vocab_size(args: argparse.Namespace) -> None:
    """Give a student from scratch the tokenizer's vocabulary."""
    args.vocab_size = args.vocab_size or min(get_tokenizer().vocab_size, args.padded_vocab_size)


def check_vocabularies(context: Context) -> None:
    """Refuse models whose embeddings are not for the run's tokenizer.

    Raises:
        ValueError: the tokenizer has ids for which the student has no embedding, the teacher lacks more ids than added
            tokens explain, or one of several teachers lacks ids that another has.
    """
    args, tokenizer_size = context.args, get_tokenizer().vocab_size
    if tokenizer_size > args.vocab_size:
        raise ValueError(
            f"vocabulary mismatch: the tokenizer ({args.tokenizer_model or args.tokenizer_type}) has "
            f"{tokenizer_size} tokens, the student only {args.vocab_size} embeddings; "
            "use the tokenizer that the student was made with"
        )
    for teacher in context.known_teachers:
        teacher_size = teacher.size.vocab_size
        if teacher_size < max(tokenizer_size - _MAX_ADDED_TOKENS, tokenizer_size // 2):
            raise ValueError(
                f"vocabulary mismatch: {teacher.label} has {teacher_size} tokens, the tokenizer "
                f"({args.tokenizer_model or args.tokenizer_type}) {tokenizer_size}; "
                "teacher and student must share a vocabulary"
            )
    known = {t.label: min(tokenizer_size, t.size.vocab_size) for t in context.known_teachers}
    if len(set(known.values())) > 1:
        told = ", ".join(f"{label} {count}" for label, count in known.items())
        raise ValueError(
            f"vocabulary mismatch: the teachers have different ones (of {tokenizer_size} of the tokenizer: {told}); "
            "all teachers of a run must share one vocabulary: leave one out"
        )


def id_holders(context: Context) -> Mapping[str, int]:
    """Count the ids of everything that must know each id of the data; nothing if no data of ours is read.

    Raises:
        ValueError: a file of the teacher's tokenizer cannot be read.
    """
    args = context.args
    if args.mock_data or not context.checks_data:
        return {}
    holders = {RUNS_TOKENIZER: get_tokenizer().vocab_size, Role.STUDENT.label: args.vocab_size}
    for teacher in context.known_teachers:
        holders[teacher.label] = teacher.size.vocab_size
        num_ids = ids_of_tokenizer(teacher.folder)
        if num_ids is not None:
            holders[f"{teacher.label}'s tokenizer"] = num_ids
    return holders


def check_data_ids(context: Context) -> None:
    """Refuse data with a token id that tokenizer, student or teacher does not have, as far as one rank looks.

    Megatron's embedding gives zeros for it if it is cut over ranks, and fails if it is not. A plan says of which data
    it has seen a sample only; a training reads them whole (`PreparedRun.check_files`).

    Raises:
        ValueError: names the set, the id and who lacks it.
    """
    if not context.id_holders:
        return
    args, sets = context.args, open_sets(context.args)
    check_token_ids(args, sets, context.id_holders)
    if context.config.dry_run and args.rank == 0:
        for prefix in unread_sets(args, sets):
            warnings.warn(
                f"{prefix}: of its token ids this plan has looked at a sample of {SAMPLED_IDS:,}; a training reads all "
                "of them, each rank its share, before it loads anything",
                stacklevel=2,
            )


def common_vocab_size(context: Context) -> int:
    """Count the ids that tokenizer, student and teacher all have."""
    shared = min(get_tokenizer().vocab_size, context.args.vocab_size)
    return min([shared, *(teacher.size.vocab_size for teacher in context.known_teachers)])
