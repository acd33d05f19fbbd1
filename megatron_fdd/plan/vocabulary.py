"""The tokenizer and the vocabulary that run, student and teacher share."""

from __future__ import annotations

import argparse

from megatron.training import get_tokenizer

from megatron_fdd.data.pairing import check_checkpoint_tokenizer
from megatron_fdd.data.sources import open_sets
from megatron_fdd.data.token_ids import check_token_ids
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
    if context.stored_teacher is not None:
        check_checkpoint_tokenizer(Role.TEACHER, context.stored_teacher.folder, context.args)
    if context.teacher_store is not None:
        check_checkpoint_tokenizer(Role.TEACHER, str(context.teacher_store.path), context.args)


def set_vocab_size(args: argparse.Namespace) -> None:
    """Give a student from scratch the tokenizer's vocabulary."""
    args.vocab_size = args.vocab_size or min(get_tokenizer().vocab_size, args.padded_vocab_size)


def check_vocabularies(context: Context) -> None:
    """Refuse models whose embeddings are not for the run's tokenizer.

    Raises:
        ValueError: the tokenizer has ids for which the student has no embedding, or the teacher lacks more ids
            than added tokens explain.
    """
    args, tokenizer_size = context.args, get_tokenizer().vocab_size
    if tokenizer_size > args.vocab_size:
        raise ValueError(
            f"vocabulary mismatch: the tokenizer ({args.tokenizer_model or args.tokenizer_type}) has "
            f"{tokenizer_size} tokens, the student only {args.vocab_size} embeddings; "
            "use the tokenizer that the student was made with"
        )
    if context.teacher_size is None:
        return
    teacher_size = context.teacher_size.vocab_size
    if teacher_size < max(tokenizer_size - _MAX_ADDED_TOKENS, tokenizer_size // 2):
        raise ValueError(
            f"vocabulary mismatch: the teacher has {teacher_size} tokens, the tokenizer "
            f"({args.tokenizer_model or args.tokenizer_type}) {tokenizer_size}; "
            "teacher and student must share a vocabulary"
        )


def check_data_ids(context: Context) -> None:
    """Refuse data with a token id that the student or the teacher does not have.

    Megatron's embedding gives zeros for it if it is cut over ranks, and fails if it is not.

    Raises:
        ValueError: names the set, the id and the model.
    """
    args = context.args
    if args.mock_data or not context.checks_data:
        return
    holders = {Role.STUDENT.label: args.vocab_size}
    if context.teacher_size is not None:
        holders[Role.TEACHER.label] = context.teacher_size.vocab_size
    check_token_ids(args, open_sets(args), holders)


def common_vocab_size(context: Context) -> int:
    """Count the ids that tokenizer, student and teacher all have."""
    shared = min(get_tokenizer().vocab_size, context.args.vocab_size)
    return shared if context.teacher_size is None else min(shared, context.teacher_size.vocab_size)
