"""The features of teachers on disk: the checks of their stores, and what a run reads of them."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_fdd.config import DEFAULTS, FddConfig
from megatron_fdd.data.sources import data_prefixes
from megatron_fdd.data.store.lens import LENS_FILE, read_stored_extras
from megatron_fdd.data.store.loader import micro_batches, read_ahead
from megatron_fdd.data.store.routed import NamedStore
from megatron_fdd.data.store.store import Store
from megatron_fdd.data.stream.folder import window_bytes
from megatron_fdd.host import console
from megatron_fdd.host.disk import sized
from megatron_fdd.losses.pairs import plan_pairs
from megatron_fdd.losses.term_modules import NOTHING, module_size
from megatron_fdd.losses.terms import needs_of, tap_terms
from megatron_fdd.plan.context import Context
from megatron_fdd.plan.routing import FLAG, routes
from megatron_fdd.step.teacher.stored import PlannedStore, read_blocks

# Seconds between two looks for a stream that is not begun.
_PAUSE_S = 0.5
# Flags with which a sample's attention or positions are not those of its units.
_OTHER_ATTENTION = ("reset_attention_mask", "reset_position_ids")


def find_stores(context: Context) -> tuple[NamedStore, ...]:
    """Open the stores of the teachers' features; none if the run has none, or no term needs a teacher.

    A stream that is to be followed may be begun later: this waits for its lens, which comes last.

    Raises:
        ValueError: there is no store, a segment of one is damaged, or a data set has not exactly one teacher.
    """
    stores = context.config.teacher_store
    if not needs_of(context.config).teacher or not stores:
        return ()
    names, folders = zip(*stores, strict=True)
    if context.config.teacher_follow and not context.config.dry_run:
        _await_stream(Path(folders[0]), context.config.teacher_wait)
    if names == ("",):
        return (NamedStore("", Store.open(folders[0], FLAG)),)
    if not context.checks_data or context.args.mock_data:
        raise ValueError(
            f"{FLAG} {names[0]}={folders[0]}: --mock-data and data of a training script have no prefix in which a name "
            "could be found; give one store, without a name"
        )
    own = routes(names, data_prefixes(context.args))
    return tuple(NamedStore(name, Store.open(folder, FLAG), own[name]) for name, folder in stores)


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


def plan_stores(context: Context) -> tuple[PlannedStore, ...]:
    """Pair the student's layers with those of each stored teacher; the student's are the same for all.

    Raises:
        ValueError: a teacher has too few layers; names its store.
    """
    plan, planned = context.plan, []
    assert plan is not None, "it is made before"
    for named in context.teacher_stores:
        num_layers = named.store.identity.num_layers
        try:
            pairs = plan_pairs(plan.config, context.args.num_layers, num_layers) if plan.pairs else ()
        except ValueError as error:
            raise ValueError(f"{FLAG} {named.store.path}: {error}") from error
        assert [pair.student_block for pair in pairs] == [pair.student_block for pair in plan.pairs]
        planned.append(PlannedStore(named, replace(plan, pairs=pairs)))
    return tuple(planned)


def check_teachers(context: Context) -> None:
    """Refuse a teacher that runs beside stored ones, what several cannot share, and to follow what is not stored.

    And a schedule of batch sizes with stored ones: a step reads more than `loader.micro_batches` says, and the last
    one reads behind the last sample.
    """
    config, schedule = context.config, context.args.step_batch_size_schedule
    if config.teacher_store and config.teacher_load is not None:
        raise ValueError(
            f"--teacher-load {config.teacher_load} and {FLAG} {config.teacher_store[0][1]}: a run has one teacher; "
            "leave one out"
        )
    if len(config.teacher_store) > 1 and config.teacher_lens is not None:
        raise ValueError(
            f"--teacher-lens {config.teacher_lens} with several teachers: a lens file is of one teacher; leave it out, "
            "and each is read through its own final norm and head"
        )
    if len(config.teacher_store) > 1 and config.teacher_follow:
        raise ValueError(
            f"--fdd-teacher-follow with several teachers: a run follows one stream; give one {FLAG}, or make the "
            "stores beforehand and leave it out"
        )
    if config.teacher_follow and not config.teacher_store:
        raise ValueError(
            f"--fdd-teacher-follow: says how {FLAG} is read; give the folder that fdd teach --follow writes to, or "
            "leave it out"
        )
    if config.teacher_store and schedule is not None:
        raise ValueError(
            f"--step-batch-size-schedule {schedule} with --fdd-teacher-store: how many samples such a training reads "
            "in a step, and in all, cannot be told beforehand, and features would be missing; leave it out, or give "
            "--teacher-load"
        )


def check_store(context: Context) -> None:
    """Refuse a store that lacks what this run compares, and terms that learn something of several teachers.

    Raises:
        ValueError: names what is missing, and the command that makes it.
    """
    for each in context.planned_stores:
        _check_content(each)
        check_precision(context.config, each.store)
        check_attention(context.args)
    if len(context.planned_stores) > 1:
        plan, size = context.plan, context.teacher_size
        assert plan is not None
        assert size is not None
        widths = context.args.hidden_size, size.hidden_size
        learned = [t.kind for t in tap_terms(plan.config) if module_size(t, widths, plan.config) != NOTHING]
        if learned:
            raise ValueError(
                f"--fdd-term {learned[0]} with several teachers: it learns or keeps something of one teacher; leave it "
                "out, or give one store"
            )


def _check_content(planned: PlannedStore) -> None:
    """Refuse a store without the blocks that are compared, or without the lens."""
    store, plan = planned.store, planned.plan
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
    config = context.config
    if not context.teacher_stores or not config.teacher_follow:
        return
    store = context.teacher_stores[0].store
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


def has_cap(store: Store) -> bool:
    """Whether a stored teacher's logits have a soft cap. ValueError if the store's lens is damaged."""
    return read_stored_extras(store.path).cap is not None


def store_bytes(args: argparse.Namespace, stores: Sequence[PlannedStore]) -> dict[str, int]:
    """Estimate what stored teachers take on the stage that holds most: a batch has as much as the widest needs."""
    plan = stores[0].plan
    widths = sum(each.store.identity.hidden_size for each in stores)
    count = read_ahead(args, whole_steps=plan.config.tokens == "all")
    # Megatron keeps a step's own to run it again.
    if plan.config.tokens == "all" or args.rerun_mode != "disabled":
        count += micro_batches(args)
    rows = args.padded_vocab_size // args.tensor_model_parallel_size
    chunks = [_chunk_blocks(each) for each in stores]
    token_bytes = [each.store.identity.token_bytes for each in stores]
    used = max(max(own) * size for own, size in zip(chunks, token_bytes, strict=True))
    held = max(_most_blocks(each) * size for each, size in zip(stores, token_bytes, strict=True))
    heads = "teacher head" if len(stores) == 1 else "teacher heads"
    return {
        f"{heads} (with one stage part of its weights)": rows * widths * args.params_dtype.itemsize,
        f"teacher features of a micro-batch, {max(map(max, chunks))} block(s)": (
            args.micro_batch_size * _used_positions(args) * used
        ),
        f"teacher features in host memory, {count} micro-batch(es)": (
            args.micro_batch_size * count * _read_positions(args) * held
        ),
    }


def describe_store(args: argparse.Namespace, planned: PlannedStore) -> list[str]:
    """Return lines about a store, and what a rank reads of it in a step; of several as if all samples were its own."""
    named, plan, store = planned.named, planned.plan, planned.store
    identity, index = store.identity, store.index
    samples = args.global_batch_size // args.data_parallel_size
    most = samples * _read_positions(args) * identity.token_bytes * _most_blocks(planned)
    whole = args.global_batch_size * args.seq_length * identity.token_bytes * sum(_chunk_blocks(planned))
    size = index.num_tokens * identity.token_bytes * len(identity.blocks)
    streamed = has_cap(store) and needs_of(plan.config).grams
    ran = ", ".join(f"{name} {value}" for name, value in identity.ran.items() if name != "dtype")
    alone = " of its samples alone" if named.name else ""
    own = str(args.params_dtype).removeprefix("torch.")
    there = f"{store.path}: {len(index)} units, {index.num_tokens} tokens, {sized(size)}"
    if plan.config.teacher_follow:
        there = f"{store.path}: a stream, with a window of {sized(window_bytes(store.path) or 0)}"
    return [
        f"  {f'teacher {named.name}'.rstrip()}: features of {identity.teacher}, {identity.form}, "
        f"{identity.token_bytes} bytes a hidden state, of the blocks {', '.join(map(str, identity.blocks))}",
        *[f"    it teaches {', '.join(named.prefixes)}"] * bool(named.prefixes),
        f"    it ran in {identity.ran['dtype']} ({ran}), in which its head is and its features are unpacked; the "
        f"student computes in {own}",
        f"    {there}",
        f"    a step{alone} reads at most {sized(most)} on a rank, and {sized(whole)} that are different on all of "
        f"them: a step of one second needs {sized(whole)}/s of the file system",
        *["    its logits have a soft cap: each delta makes those of both its layers again"] * streamed,
    ]


def _chunk_blocks(planned: PlannedStore) -> list[int]:
    """Return how many blocks each chunk reads."""
    return [len(read_blocks(planned.plan, chunk, planned.store)) for chunk in planned.plan.chunks]


def _most_blocks(planned: PlannedStore) -> int:
    """Return how many blocks the stage reads that reads most."""
    chunks, stages = _chunk_blocks(planned), planned.plan.num_stages
    return max(sum(chunks[stage::stages]) for stage in range(stages))


def _used_positions(args: argparse.Namespace) -> int:
    """Return the positions of a sample whose features a rank has on its device."""
    cut = args.sequence_parallel and not args.dataloader_inter_document_masking
    return _read_positions(args) if cut else args.seq_length // args.context_parallel_size


def _read_positions(args: argparse.Namespace) -> int:
    """Return the positions of a sample that a rank reads."""
    positions, ranks = args.seq_length // args.context_parallel_size, args.tensor_model_parallel_size
    return positions if positions % ranks else positions // ranks
