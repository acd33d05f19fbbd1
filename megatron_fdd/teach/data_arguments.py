"""Megatron's arguments for the data of a training alone, where no model of Megatron runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron.training import get_tokenizer
from megatron.training.arguments import validate_args
from megatron.training.global_vars import set_global_variables

from megatron_fdd.data.checks import check_data_args
from megatron_fdd.data.flags import is_of_the_data
from megatron_fdd.data.full_validation import check_full_validation
from megatron_fdd.data.index_cache import mend_cache
from megatron_fdd.data.pairing import check_checkpoint_tokenizer, ids_of_tokenizer
from megatron_fdd.data.sources import open_sets
from megatron_fdd.data.token_ids import RUNS_TOKENIZER, check_all_token_ids, check_token_ids
from megatron_fdd.data.tokenizer import check_tokenizer_files
from megatron_fdd.data.tokenizer_identity import TOKENIZER_FOLDER, has_tokenizer
from megatron_fdd.host.panics import panics_as_errors
from megatron_fdd.host.plugins import import_plugins, named_plugins
from megatron_fdd.host.role import Role
from megatron_fdd.plan.command_line import parse_command_line
from megatron_fdd.plan.megatron_errors import megatrons_errors
from megatron_fdd.plan.numbers import refuse_missing
from megatron_fdd.plan.teacher_store import check_attention

# A model that Megatron accepts, and nobody builds.
_NO_MODEL: dict[str, object] = {
    **dict.fromkeys(("num_layers", "num_attention_heads", "micro_batch_size", "eval_micro_batch_size"), 1),
    "hidden_size": 64,
    "transformer_impl": "local",
    "distributed_backend": "gloo",
    "lr": 1e-4,
}


def data_arguments(flags: Sequence[str], companions: Path) -> argparse.Namespace:
    """Read a training's flags, keep those about its data, and make them Megatron's globals. Collectives: none.

    Args:
        companions: a folder with the teacher's tokenizer in `tokenizer/`, which is the training's where no flag names
            another.

    Raises:
        ValueError: a flag is wrong, the data cannot be read, or its tokenizer is not the teacher's.
    """
    sys.argv[1:] = list(flags)
    import_plugins(named_plugins(flags))
    args, defaults = parse_command_line()
    for name in defaults:
        if not (is_of_the_data(name) or name.startswith("fdd_")):
            setattr(args, name, defaults[name])
    vars(args).update(_NO_MODEL, max_position_embeddings=args.seq_length)
    refuse_missing(args)
    if args.tokenizer_type is None and has_tokenizer(companions / TOKENIZER_FOLDER):
        args.tokenizer_type = "HuggingFaceTokenizer"
        args.tokenizer_model = str(companions / TOKENIZER_FOLDER)
    check_tokenizer_files(args.tokenizer_type, args.tokenizer_model)
    with (
        megatrons_errors("these flags"),
        panics_as_errors(f"--tokenizer-model {args.tokenizer_model} is damaged, copy it again"),
    ):
        validate_args(args, {})
        set_global_variables(args)
    check_attention(args)
    check_full_validation(args)
    check_data_args(args)
    mend_cache(args)
    check_checkpoint_tokenizer(Role.TEACHER, str(companions), args)
    return args


def check_teacher_ids(args: argparse.Namespace, companions: Path, num_ids: int, num_positions: float) -> None:
    """Refuse data with ids, or with rows, for which the teacher has no embedding.

    Args:
        companions: a folder with the teacher's tokenizer in `tokenizer/`.
        num_ids: rows of the teacher's embedding.
        num_positions: the longest row that it takes.

    Collectives over all ranks: those of `check_all_token_ids`.

    Raises:
        ValueError: names the set and the id, or the length.
    """
    if args.seq_length > num_positions:
        raise ValueError(
            f"--seq-length {args.seq_length}: the teacher takes rows of at most {num_positions} tokens "
            "(max_position_embeddings in its config.json); choose a shorter one for the training"
        )
    if args.mock_data:
        return
    holders = {RUNS_TOKENIZER: get_tokenizer().vocab_size, Role.TEACHER.label: num_ids}
    tokenizer_ids = ids_of_tokenizer(str(companions))
    if tokenizer_ids is not None:
        holders[f"{Role.TEACHER.label}'s tokenizer"] = tokenizer_ids
    check_token_ids(args, open_sets(args), holders)
    check_all_token_ids(args, holders)
