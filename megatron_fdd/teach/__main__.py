"""The entry point of a producer: `torchrun --nproc-per-node N -m megatron_fdd.teach --engine megatron --teacher T ...`.

`fdd teach` starts it. Behind its own flags stand those of the training whose data it reads, and of the teacher's
layout.
"""

from __future__ import annotations

import os
import sys

from megatron_fdd.host.process import end_at_interrupt, end_with, print_error, raise_at_interrupt
from megatron_fdd.host.start import start
from megatron_fdd.teach.request import TeachRequest, named_engine, parse, parser

if __name__ == "__main__":
    end_at_interrupt()
    os.environ["HF_HUB_OFFLINE"] = "1"  # a teacher is a folder: nothing of it is looked for online
    if named_engine(sys.argv[1:]) == "transformers":
        os.environ["FDD_REHEARSE"] = "0"  # transformers knows by itself what to do without a GPU
    start()

import signal
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from megatron.training.training import get_train_valid_test_num_samples, update_train_iters
from tqdm import tqdm

from megatron_fdd.convert.hf_companions import carry_companions
from megatron_fdd.data.provider import train_valid_test_provider
from megatron_fdd.data.store.coverage import (
    Coverage,
    Ids,
    Source,
    Unit,
    find_missing,
    joined,
    read_ids,
    sources_of,
)
from megatron_fdd.data.store.identity import write_identity
from megatron_fdd.data.store.lens import lacks_lens, write_stored_lens
from megatron_fdd.data.store.store import Store
from megatron_fdd.data.store.whole_file import sweep
from megatron_fdd.host import console
from megatron_fdd.host.disk import explain
from megatron_fdd.host.process import is_first_rank
from megatron_fdd.host.together import together
from megatron_fdd.plan.megatron_errors import in_one_line, is_from_here
from megatron_fdd.teach.engine import Engine, PreparedTeacher
from megatron_fdd.teach.megatron_teacher import MegatronTeacher
from megatron_fdd.teach.produce import produce
from megatron_fdd.teach.work import batches, part_of

# Tokens of a unit whose logits are compared with the lens: with 256,000 words these are 128 MB.
_COMPARED_TOKENS = 128


def teach(request: TeachRequest) -> None:
    """Compute what the store lacks of the training's data.

    Collectives: those of the teacher; a few gathers of objects.

    Raises:
        ValueError: something given is wrong, does not fit the store, or cannot be read or written.
    """
    teacher = _prepared(request)
    log = console.keep_log(Path(tempfile.mkdtemp(prefix="fdd-teach-")))
    if log is not None:
        console.say(f"loading the teacher and the data; Megatron's own output: {log.with_name('rank*.log')}")
    teacher.start()
    update_train_iters(teacher.args)  # from --train-samples
    sources = sources_of(train_valid_test_provider(get_train_valid_test_num_samples()), teacher.args)
    with together():
        if is_first_rank():
            _open_folder(request, teacher)
    work = _work(request, sources)
    all_batches = batches(work.units, request.batch_tokens)
    if all_batches or work.lacks_lens:
        _compute(teacher.engine(), request.store, sources, work, all_batches)
    with together():
        if is_first_rank():
            _save_index(request.store)


def _compute(
    engine: Engine,
    store: Path,
    sources: Sequence[Source],
    work: _Work,
    all_batches: Sequence[Sequence[Unit]],
) -> None:
    """Write the lens, if there is none, and the features of all batches."""
    if work.lacks_lens:
        _write_lens(engine, store, [read_ids(sources, work.example)[:_COMPARED_TOKENS]])
    started_s = time.perf_counter()
    produce(engine, store, sources, all_batches, shows_progress=is_first_rank(), say=console.say)
    dist.barrier()
    seconds = time.perf_counter() - started_s
    num_tokens = sum(unit.last - unit.first for batch in all_batches for unit in batch)
    console.say(f"{num_tokens} tokens in {seconds:.1f} s, {num_tokens / seconds:.0f} tokens/s")


def _prepared(request: TeachRequest) -> PreparedTeacher:
    """Read and check the command line for the engine that it names."""
    if request.engine == "megatron":
        return MegatronTeacher(request)
    from megatron_fdd.teach.transformers_teacher import TransformersTeacher  # whose imports take seconds

    return TransformersTeacher(request)


def _open_folder(request: TeachRequest, teacher: PreparedTeacher) -> None:
    """Make the store, or join it; put the teacher's tokenizer beside it."""
    write_identity(request.store, teacher.identity)
    carry_companions(teacher.companions, request.store)
    if count := sweep(request.store):
        console.say(f"{request.store}: removed {count} file(s) that killed producers had left")


@dataclass(frozen=True, slots=True)
class _Work:
    """What is to be done.

    Attributes:
        units: this producer's part of the units that the store lacks.
        lacks_lens: whether the store has no lens, or a damaged one.
        example: a unit of the data, on which the lens is compared.
    """

    units: list[Unit]
    lacks_lens: bool
    example: Unit


def _work(request: TeachRequest, sources: Sequence[Source]) -> _Work:
    """Find out what is missing; the samples are dealt over all ranks, and the first one's answer is that of all.

    Collectives: two all-gathers over all ranks, one of the keys of all units; one broadcast of a list of units.

    Raises:
        ValueError: the data have no sample, or the store cannot be read. The same on every rank.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    with together():
        store = Store.open(request.store, "--store")
        total = sum(len(range(rank, source.num_samples, world)) for source in sources)
        with tqdm(total=total, unit="sample", desc="units", disable=None if rank == 0 else True) as bar:
            share = find_missing(sources, store.index, deal=(rank, world), on_sample=bar.update)
    shares = [share] * world
    dist.all_gather_object(shares, share)
    found = joined(shares)
    if found.example is None:
        raise ValueError("the training of these flags reads no token: give --train-iters and data")
    work: list[_Work | None] = [None]
    with together():
        if rank == 0:
            own = part_of(found.missing, request.part)
            _say_work(request, store, found, own)
            work[0] = _Work(own, lacks_lens(request.store), found.example)
    dist.broadcast_object_list(work, src=0)
    assert work[0] is not None
    return work[0]


def _say_work(request: TeachRequest, store: Store, found: Coverage, own: Sequence[Unit]) -> None:
    """Say before the work begins how much of it there is."""
    identity = store.identity
    unit_bytes = identity.token_bytes * len(identity.blocks)
    num_units = len(found.keys)
    again = found.num_read - num_units
    tokens = sum(unit.last - unit.first for unit in own)
    part = "" if request.part[1] == 1 else f", part {request.part[0]}/{request.part[1]}"
    console.say(
        f"The run reads {found.num_read} units of {found.tokens_read} tokens; {num_units} are different, "
        f"{again} are read again ({again / max(found.num_read, 1):.0%})."
    )
    console.say(
        f"{request.store}: {len(found.missing)} of them are missing{part}. To compute: {len(own)} units, {tokens} "
        f"tokens, {tokens * unit_bytes / 1e9:.3f} GB ({identity.form}, {len(identity.blocks)} blocks)."
    )


def _write_lens(engine: Engine, store: Path, units: Sequence[Ids]) -> None:
    """Write the teacher's lens, compared with the teacher's own logits, where the store has none."""
    lens = engine.lens(units)
    with together():
        if lens is not None and engine.replica == 0:
            write_stored_lens(store, lens)
            console.say(
                f"lens: norm and head give the teacher's own logits to {lens.error:.1e} of the largest",
                is_chosen=True,
            )


def _save_index(store: Path) -> None:
    """Write the index, with which trainings open the store at once."""
    made = Store.open(store, "--store")
    made.save_index()
    console.say(f"{store}: {len(made.index)} units, {made.index.num_tokens} tokens")


def main() -> int:
    """Run as `sys.argv` says. Return the exit status, which is 1 after an error that the user can correct."""
    try:
        teach(parse(sys.argv[1:]))
    except KeyboardInterrupt:
        console.complain("fdd teach: interrupted; the same command goes on")
        return 128 + signal.SIGINT
    except (ValueError, OSError) as error:
        console.log_traceback()
        told = explain(error) if is_from_here(error) or isinstance(error, OSError) else in_one_line(error)
        print_error(f"megatron_fdd: error: {told}")
        return 1
    return 0


if __name__ == "__main__":
    if not {"-h", "--help"}.isdisjoint(sys.argv):
        parser().print_help()
        sys.exit()
    raise_at_interrupt()
    end_with(main)
