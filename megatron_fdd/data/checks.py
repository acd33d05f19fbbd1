"""Checks of a run's data: everything that can be refused before the first collective."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.object_storage_utils import is_object_storage_path
from megatron.core.tokenizers import MegatronTokenizerBase
from megatron.training import get_tokenizer

from megatron_fdd.data.datasets import piece_counts
from megatron_fdd.data.full_validation import NO_TEST
from megatron_fdd.data.index_cache import check_cache_folders
from megatron_fdd.data.list_files import check_list_files
from megatron_fdd.data.megatron_tokenizer import identity_of
from megatron_fdd.data.prepared import PreparedSet
from megatron_fdd.data.sources import blends, cuts_documents, data_prefixes, evaluates, open_sets
from megatron_fdd.data.token_ids import RUNS_TOKENIZER, check_token_ids
from megatron_fdd.data.tokenizer_identity import FormerStamp, compare

_PART_NAMES = ("training", "validation", "test")
# The flags for which training looks for the end-of-document token.
_FLAGS_OF_ENDS = ("reset_position_ids", "reset_attention_mask", "eod_mask_loss")


@dataclass(frozen=True, slots=True)
class _Part:
    """The documents [first, last) of one set that training, validation or test reads."""

    name: str
    prefix: str
    first: int
    last: int


def check_data_args(args: argparse.Namespace, tokenizer: MegatronTokenizerBase | None = None) -> None:
    """Refuse flags and data files that this run cannot train with; every rank looks for itself.

    `tokenizer` is Megatron's global one unless given. Sets in object storage are looked at only when they are read.
    Collectives: none.

    Raises:
        ValueError: names the value, the bound and the remedy.
    """
    check_list_files(args)
    _check_flags(args)
    if args.mock_data:
        return
    tokenizer = get_tokenizer() if tokenizer is None else tokenizer
    check_cache_folders(args)
    sets = open_sets(args)
    _check_kinds(args, sets)
    for prepared in sets.values():
        _check_sequence_length(args, prepared)
        _check_tokenizer(args, prepared, tokenizer)
    for part in _parts(args, sets):
        _check_part(args, part, sets[part.prefix])
    check_token_ids(args, sets, {RUNS_TOKENIZER: tokenizer.vocab_size})


def _check_flags(args: argparse.Namespace) -> None:
    """Refuse flags that contradict each other or that no data set here knows."""
    has_data = bool(data_prefixes(args))
    refused = (
        (
            cuts_documents(args) and any(map(is_object_storage_path, data_prefixes(args))),
            "--fdd-text-units documents: documents in object storage are not cut; copy the set to a disk",
        ),
        (
            args.sft,
            "--sft is Megatron's own instruction dataset; prepare the JSONL with fdd prepare and "
            "give it as --data-path: it is recognised",
        ),
        (args.fim_data, "--fim-data is not supported; leave it out"),
        (
            args.dataloader_type == "external",
            "--dataloader-type external: these data sets need one of Megatron's own loaders; leave it out",
        ),
        (
            args.dataloader_inter_document_masking and args.reset_attention_mask,
            "--reset-attention-mask and --dataloader-inter-document-masking both keep attention inside documents, "
            "in different ways; leave one out (the latter needs no mask of --seq-length x --seq-length)",
        ),
        (has_data and args.mock_data, "--mock-data and a data path exclude each other; leave one out"),
        (
            not has_data and not args.mock_data,
            "no data: give --data-path or --train-data-path, or --mock-data",
        ),
    )
    for condition, message in refused:
        if condition:
            raise ValueError(message)
    if args.reset_attention_mask and args.transformer_impl != "local":
        _warn(
            args,
            f"--reset-attention-mask has no effect with --transformer-impl {args.transformer_impl}: its "
            "attention is causal, whatever the mask says",
        )


def _check_kinds(args: argparse.Namespace, sets: dict[str, PreparedSet]) -> None:
    """Refuse text and instructions in one run."""
    kinds = {"text" if s.info is None else s.info.kind: s.prefix for s in sets.values()}
    if len(kinds) > 1:
        raise ValueError(
            f"{kinds['text']} is plain text and {kinds['instruction']} holds instructions; one run reads one "
            "kind, so give the sets to two runs"
        )
    ignored = [name for name in _FLAGS_OF_ENDS if getattr(args, name)]
    if cuts_documents(args):
        if "instruction" in kinds or args.mock_data:
            _warn(args, "--fdd-text-units documents: no effect but on plain text")
        elif not args.dataloader_inter_document_masking:
            _warn(
                args,
                "--fdd-text-units documents: each row holds one piece of a document, and padding; give "
                "--dataloader-inter-document-masking, which fills it with pieces",
            )
    if "instruction" in kinds and ignored:
        flags = ", ".join("--" + name.replace("_", "-") for name in ignored)
        _warn(args, f"{flags}: no effect on instructions, whose samples are single documents")


def _check_sequence_length(args: argparse.Namespace, prepared: PreparedSet) -> None:
    """Refuse a prepared set with instructions longer than a sequence."""
    info = prepared.info
    if info is None or info.kind != "instruction" or info.longest_document <= args.seq_length + 1:
        return
    raise ValueError(
        f"{prepared.prefix} has an instruction of {info.longest_document} tokens and --seq-length "
        f"{args.seq_length} holds {args.seq_length + 1}; raise --seq-length to {info.longest_document - 1} "
        f"or prepare the set again with --seq-length {args.seq_length}, which cuts it"
    )


def _check_tokenizer(
    args: argparse.Namespace, prepared: PreparedSet, tokenizer: MegatronTokenizerBase
) -> None:
    """Refuse data that was prepared with another tokenizer."""
    if prepared.info is None:
        return
    _check_end(args, prepared, tokenizer)
    stamp, identity = prepared.info.tokenizer, identity_of(tokenizer)
    if identity is None or (isinstance(stamp, FormerStamp) and stamp.vocabulary_sha256 is None):
        _warn(
            args,
            f"{prepared.prefix}: the tokenizer of this run has no vocabulary to compare; with another one "
            "than the data was prepared with, the run learns noise",
        )
        return
    if isinstance(stamp, FormerStamp):
        _warn(args, f"{prepared.prefix}: prepared by an older version: only its vocabulary is compared")
        difference = None if stamp.matches(identity) else "not all ids mean the same (their hashes differ)"
    else:
        found = compare(stamp, identity, ("the data", "this run"))
        difference = found.difference
        for remark in found.remarks:
            _warn(args, f"{prepared.prefix} and this run's tokenizer: {remark}")
    if difference is not None:
        raise ValueError(
            f"{prepared.prefix} was prepared with a tokenizer that is not this run's: {difference}; use the same "
            "--tokenizer-model, or prepare the data again"
        )


def _check_end(args: argparse.Namespace, prepared: PreparedSet, tokenizer: MegatronTokenizerBase) -> None:
    """Refuse flags that would look for another end of a document than the one in the text."""
    assert prepared.info is not None
    asked = [name for name in _FLAGS_OF_ENDS if getattr(args, name)]
    stamp = prepared.info.tokenizer
    if prepared.info.kind == "text" and asked and stamp.eod != tokenizer.eod:
        raise ValueError(
            f"--{asked[0].replace('_', '-')} looks for the end token of this run's tokenizer, id {tokenizer.eod}, and "
            f"{prepared.prefix} was prepared with id {stamp.eod}; leave the flag out, or prepare without --eod-token"
        )


def _parts(args: argparse.Namespace, sets: dict[str, PreparedSet]) -> Iterator[_Part]:
    """Yield the documents that each of training, validation and test reads of each local set."""
    blend, per_part = blends(args)
    ranges: list[tuple[float, float] | None] = [(0.0, 1.0)] * len(_PART_NAMES)
    if blend is not None:
        ranges = convert_split_vector_to_split_matrix(parse_and_normalize_split(args.split))
        if not evaluates(args):
            ranges[1:] = [None, None]
    for index, (name, share) in enumerate(zip(_PART_NAMES, ranges, strict=True)):
        source = blend if per_part is None else per_part[index]
        if source is None or share is None:
            if index == 0 or (index == 1 and evaluates(args)):
                raise ValueError(_no_data(name, blend is not None, args.split))
            continue
        if index == 2 and args.full_validation:
            raise ValueError(NO_TEST)
        for prefix in source[0]:
            if prefix in sets:
                count = len(_split_lengths(args, sets[prefix]))
                # Rounded as in BlendedMegatronDatasetBuilder.
                yield _Part(name, prefix, int(round(share[0] * count)), int(round(share[1] * count)))


def _split_lengths(args: argparse.Namespace, prepared: PreparedSet) -> np.ndarray:
    """Return the lengths of what --split divides: documents, or pieces of them (1 for each, which has a token)."""
    is_text = prepared.info is None or prepared.info.kind == "text"
    if not (is_text and cuts_documents(args)):
        return prepared.document_lengths
    return np.ones(int(piece_counts(prepared.document_lengths, args.seq_length).sum()), np.uint8)


def _no_data(name: str, is_split: bool, split: str) -> str:
    cause = f"--split {split} has no share for it" if is_split else "it has no data path of its own"
    remedy = "" if name == "training" else ", or switch evaluation off with --eval-iters 0"
    return f"there is no {name} data: {cause}; give it one{remedy}"


def _check_part(args: argparse.Namespace, part: _Part, prepared: PreparedSet) -> None:
    """Refuse a part without a token: Megatron's dataset would count its epochs for ever."""
    lengths, what = _split_lengths(args, prepared), "pieces" if cuts_documents(args) else "documents"
    if np.any(lengths[part.first : part.last]):
        return
    raise ValueError(
        f"the {part.name} part of {part.prefix} has {part.last - part.first} {what} and no token (the set "
        f"has {len(lengths)} {what}, --split is {args.split}); give it a larger share "
        "in --split, a share of 0, or a set of its own (--valid-data-path)"
    )


def _warn(args: argparse.Namespace, message: str) -> None:
    if args.rank == 0:
        warnings.warn(message, stacklevel=3)
