"""The teacher's features on disk: the checks of a store, and what a run reads of it."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from megatron_fdd.config import DEFAULTS, FddConfig
from megatron_fdd.data.store.lens import LENS_FILE, read_stored_extras
from megatron_fdd.data.store.loader import micro_batches, read_ahead
from megatron_fdd.data.store.store import Store
from megatron_fdd.data.stream.folder import window_bytes
from megatron_fdd.host import console
from megatron_fdd.host.disk import sized
from megatron_fdd.losses.layer_plan import Plan
from megatron_fdd.losses.terms import needs_of
from megatron_fdd.plan.context import Context
from megatron_fdd.step.teacher.stored import read_blocks

FLAG = "--fdd-teacher-store"
# Seconds between two looks for a stream that is not begun.
_PAUSE_S = 0.5
# Flags with which a sample's attention or positions are not those of its units.
_OTHER_ATTENTION = ("reset_attention_mask", "reset_position_ids")


def find_store(config: FddConfig) -> Store | None:
    """Open the store of the teacher's features; return None if the run has none, or no term needs a teacher.

    A stream that is to be followed may be begun later: this waits for its lens, which comes last.

    Raises:
        ValueError: there is no store, or a segment of it is damaged.
    """
    if not needs_of(config).teacher or config.teacher_store is None:
        return None
    if config.teacher_follow and not config.dry_run:
        _await_stream(Path(config.teacher_store), config.teacher_wait)
    return Store.open(config.teacher_store, FLAG)


def _await_stream(path: Path, wait_s: float) -> None:
    """Wait until a producer has begun a stream.

    Raises:
        ValueError: none has in that time.
    """
    until_s = time.monotonic() + wait_s
    if not (path / LENS_FILE).exists():
        console.say(f"{FLAG} {path}: waiting for a producer to begin the stream, {wait_s:g} s at most")
    while not (path / LENS_FILE).exists():
        if time.monotonic() > until_s:
            raise ValueError(
                f"{FLAG} {path}: no producer has begun this stream in {wait_s:g} s (no {LENS_FILE}); start fdd teach "
                "--follow, or wait longer with --fdd-teacher-wait"
            )
        time.sleep(_PAUSE_S)


def check_one_teacher(context: Context) -> None:
    """Refuse a teacher that runs beside one whose features are stored, and to follow a teacher that is not stored."""
    config = context.config
    if config.teacher_store is not None and config.teacher_load is not None:
        raise ValueError(
            f"--teacher-load {config.teacher_load} and {FLAG} {config.teacher_store}: a run has one teacher; leave one "
            "out"
        )
    if config.teacher_follow and config.teacher_store is None:
        raise ValueError(
            f"--fdd-teacher-follow: says how {FLAG} is read; give the folder that fdd teach --follow writes to, or "
            "leave it out"
        )


def check_store(context: Context) -> None:
    """Refuse a store that lacks what this run compares.

    Raises:
        ValueError: names what is missing, and the command that makes it.
    """
    store, plan, args = context.teacher_store, context.plan, context.args
    if store is None:
        return
    assert plan is not None, "the phase is made when it is known"
    identity, where = store.identity, f"{FLAG} {store.path}"
    wanted = {pair.teacher_block for pair in plan.pairs}
    if not wanted <= set(identity.blocks):
        raise ValueError(
            f"{where}: has the teacher's blocks {identity.blocks}, and this run compares {sorted(wanted)}; choose "
            "among those with --fdd-layer-pairs, or make a store with fdd teach and this run's --fdd-layers"
        )
    if not (store.path / LENS_FILE).is_file():
        raise ValueError(
            f"{where}: has no {LENS_FILE}: its producer was ended before it wrote it; run fdd teach again"
        )
    check_precision(context.config, store)
    check_attention(args)


def check_precision(config: FddConfig, store: Store) -> None:
    """Refuse a store whose teacher ran, or whose features are packed, in another precision than flags ask for."""
    identity, where = store.identity, f"{FLAG} {store.path}"
    ran = identity.ran.get("fp8", "no")
    if config.teacher_fp8_format and ran != f"{config.teacher_fp8_format} {config.teacher_fp8_recipe}":
        raise ValueError(
            f"--teacher-fp8-format {config.teacher_fp8_format} --teacher-fp8-recipe {config.teacher_fp8_recipe}: the "
            f"teacher of {where} ran in {identity.ran['dtype']}, FP8: {ran}; leave them out, or make a store with fdd "
            "teach and these flags"
        )
    if config.tap_dtype not in (DEFAULTS["tap_dtype"], identity.form):
        raise ValueError(
            f"--fdd-tap-dtype {config.tap_dtype}: {where} has hidden states in {identity.form}, which are read as they "
            f"are; leave it out, or make a store with fdd teach --form {config.tap_dtype}"
        )


def check_attention(args: argparse.Namespace) -> None:
    """Refuse flags with which a sample's attention is not that of its units; for a training and for `fdd teach`."""
    for name in _OTHER_ATTENTION:
        if getattr(args, name) and not args.dataloader_inter_document_masking:
            raise ValueError(
                f"--{name.replace('_', '-')} with {FLAG} or fdd teach: features are stored for text that is read "
                "as a whole, or document by document; leave it out, or give "
                "--dataloader-inter-document-masking, which keeps documents apart"
            )


def check_stream(context: Context) -> None:
    """Refuse a stream that cannot be followed, and to follow a store that is none.

    Raises:
        ValueError: names what is missing or too long.
    """
    store, config = context.teacher_store, context.config
    if store is None or not config.teacher_follow:
        return
    limit = context.args.distributed_timeout_minutes
    if window_bytes(store.path) is None:
        raise ValueError(
            f"--fdd-teacher-follow: {FLAG} {store.path} is no stream; leave it out, or make the store with fdd teach "
            "--follow"
        )
    if config.teacher_wait > 60 * limit:
        raise ValueError(
            f"--fdd-teacher-wait {config.teacher_wait:g}: ranks that wait for each other give up after "
            f"--distributed-timeout-minutes {limit}, and nobody would hear why; give less, or raise that"
        )


def has_cap(store: Store | None) -> bool:
    """Whether a stored teacher's logits have a soft cap. ValueError if the store's lens is damaged."""
    return store is not None and read_stored_extras(store.path).cap is not None


def store_bytes(plan: Plan, args: argparse.Namespace, store: Store) -> dict[str, int]:
    """Estimate what a stored teacher takes on the stage that holds most."""
    identity, stages = store.identity, plan.num_stages
    each = args.micro_batch_size * identity.token_bytes
    chunks = [len(read_blocks(plan, chunk, store)) for chunk in plan.chunks]
    most = max(sum(chunks[stage::stages]) for stage in range(stages))
    figures = {
        "teacher head (with one stage part of its weights)": (
            args.padded_vocab_size
            // args.tensor_model_parallel_size
            * identity.hidden_size
            * args.params_dtype.itemsize
        ),
        f"teacher features of a micro-batch, {max(chunks)} block(s)": max(chunks)
        * _used_positions(args)
        * each,
    }
    count = read_ahead(args, whole_steps=plan.config.tokens == "all")
    if (
        plan.config.tokens == "all" or args.rerun_mode != "disabled"
    ):  # Megatron keeps a step's own to run it again
        count += micro_batches(args)
    figures[f"teacher features in host memory, {count} micro-batch(es)"] = (
        most * count * _read_positions(args) * each
    )
    return figures


def describe_store(plan: Plan, args: argparse.Namespace, store: Store) -> list[str]:
    """Return lines about the store, and what a rank reads of it in a step."""
    identity, stages, index = store.identity, plan.num_stages, store.index
    samples = args.global_batch_size // args.data_parallel_size
    chunks = [len(read_blocks(plan, chunk, store)) for chunk in plan.chunks]
    each = samples * _read_positions(args) * identity.token_bytes
    most = max(sum(chunks[stage::stages]) for stage in range(stages)) * each
    whole = args.global_batch_size * args.seq_length * identity.token_bytes * sum(chunks)
    size = index.num_tokens * identity.token_bytes * len(identity.blocks)
    streamed = has_cap(store) and needs_of(plan.config).grams
    ran = ", ".join(f"{name} {value}" for name, value in identity.ran.items() if name != "dtype")
    own = str(args.params_dtype).removeprefix("torch.")
    there = f"{store.path}: {len(index)} units, {index.num_tokens} tokens, {sized(size)}"
    if plan.config.teacher_follow:
        there = f"{store.path}: a stream, with a window of {sized(window_bytes(store.path) or 0)}"
    return [
        f"  teacher: features of {identity.teacher}, {identity.form}, {identity.token_bytes} bytes a hidden state, of "
        f"the blocks {', '.join(map(str, identity.blocks))}",
        f"    it ran in {identity.ran['dtype']} ({ran}), in which its head is and its features are unpacked; the "
        f"student computes in {own}",
        f"    {there}",
        f"    a step reads at most {sized(most)} on a rank, and {sized(whole)} that are different on all of them: a "
        f"step of one second needs {sized(whole)}/s of the file system",
        *["    its logits have a soft cap: each delta makes those of both its layers again"] * streamed,
    ]


def _used_positions(args: argparse.Namespace) -> int:
    """Return the positions of a sample whose features a rank has on its device."""
    cut = args.sequence_parallel and not args.dataloader_inter_document_masking
    return _read_positions(args) if cut else args.seq_length // args.context_parallel_size


def _read_positions(args: argparse.Namespace) -> int:
    """Return the positions of a sample that a rank reads."""
    positions, ranks = args.seq_length // args.context_parallel_size, args.tensor_model_parallel_size
    return positions if positions % ranks else positions // ranks
