"""The check that teacher, student, run and data share a tokenizer.

It compares what a checkpoint stores with what the run uses.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

from megatron.core.tokenizers import MegatronTokenizerBase
from megatron.training import get_tokenizer

from megatron_fdd.data.megatron_tokenizer import identity_of
from megatron_fdd.data.tokenizer_identity import (
    TOKENIZER_FOLDER,
    Comparison,
    TokenizerIdentity,
    TokenizerStamp,
    compare,
    identity_of_folder,
    stored_identity,
)
from megatron_fdd.host.role import Role


def check_checkpoint_tokenizer(
    role: Role, load: str, args: argparse.Namespace, tokenizer: MegatronTokenizerBase | None = None
) -> None:
    """Refuse a checkpoint whose tokenizer is not the run's.

    Tokens that were added to only one of the tokenizers do not count as a difference; `ids_of_tokenizer` is for data
    that holds them.

    Args:
        load: the checkpoint's folder; it has the tokenizer's files in `tokenizer/` if our conversion made it.
        args: this run's arguments.
        tokenizer: the run's; Megatron's global one unless given.

    Collectives: none.

    Raises:
        ValueError: names the first difference; the same on every rank.
    """
    folder = Path(load) / TOKENIZER_FOLDER
    stored = stored_identity(folder)
    ours = identity_of(get_tokenizer() if tokenizer is None else tokenizer)
    if stored is None:
        if role is Role.TEACHER:
            _warn(
                args,
                f"the teacher {Path(load).name} stores no tokenizer, so nothing checks that its ids mean what the "
                "data's ids mean; if they do not, the student learns noise (put its files beside the model's; fdd "
                "import keeps them)",
            )
        return
    if ours is None:
        _warn(
            args,
            f"--tokenizer-type {args.tokenizer_type} has no vocabulary, so it cannot be compared with {role.label}'s "
            f"({folder}); make sure that the ids mean the same",
        )
        return
    found = _compare(folder, stored, ours, (role.label, "this run"))
    if found.difference is not None:
        raise ValueError(
            f"{role.label}'s tokenizer ({folder}) is not the run's (--tokenizer-model {args.tokenizer_model}): "
            f"{found.difference}. Teacher, student and data must share a tokenizer: give the one that {role.label} was "
            "trained with, and prepare the data with it"
        )
    for remark in found.remarks:
        _warn(args, f"{role.label}'s tokenizer ({folder}) and the run's: {remark}")


def ids_of_tokenizer(load: str, tokenizer: MegatronTokenizerBase | None = None) -> int | None:
    """Count the ids of the tokenizer that a checkpoint stores; None where it cannot be compared with the run's.

    Raises:
        ValueError: a file of the tokenizer cannot be read.
    """
    stored = stored_identity(Path(load) / TOKENIZER_FOLDER)
    if stored is None or identity_of(get_tokenizer() if tokenizer is None else tokenizer) is None:
        return None
    return (stored if isinstance(stored, TokenizerStamp) else stored.stamp).largest_id + 1


def _compare(
    folder: Path, stored: TokenizerStamp | TokenizerIdentity, ours: TokenizerIdentity, names: tuple[str, str]
) -> Comparison:
    """Compare by the stamp if there is one; then by the tokenizer's files.

    The files name ids, of which a stamp has only hashes. Files alone do not tell whether added tokens include
    white space:
    tokenizer_config.json may overrule them.
    """
    if not isinstance(stored, TokenizerStamp):
        return compare(stored, ours, names, with_added_texts=False)
    found = compare(stored, ours, names)
    if found.difference is None:
        return found
    by_files = compare(identity_of_folder(folder), ours, names, with_added_texts=False)
    return found if by_files.difference is None else by_files


def _warn(args: argparse.Namespace, message: str) -> None:
    if args.rank == 0:
        warnings.warn(message, stacklevel=3)
