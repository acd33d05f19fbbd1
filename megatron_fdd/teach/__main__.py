"""The entry point of a producer: `torchrun --nproc-per-node N -m megatron_fdd.teach --engine megatron --teacher T ...`.

`fdd teach` starts it. Behind its own flags stand those of the training whose data it reads, and of the teacher's
layout.
"""

from __future__ import annotations

import os
import sys

from megatron_fdd.host.process import (
    begin_as_rank,
    end_with,
    print_error,
    raise_at_interrupt,
    status_after,
)
from megatron_fdd.host.start import start
from megatron_fdd.teach.request import TeachRequest, named_engine, parse, parser

if __name__ == "__main__":
    begin_as_rank()
    os.environ["HF_HUB_OFFLINE"] = "1"  # a teacher is a folder: nothing of it is looked for online
    if named_engine(sys.argv[1:]) in ("transformers", "vllm"):
        os.environ["FDD_REHEARSE"] = "0"  # these know by themselves what to do without a GPU
    start()

import contextlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch.distributed as dist
from megatron.training.training import get_train_valid_test_num_samples, update_train_iters

from megatron_fdd.convert.hf_companions import carry_companions
from megatron_fdd.data.provider import train_valid_test_provider
from megatron_fdd.data.store.counted import keep
from megatron_fdd.data.store.coverage import Ids, Source, first_unit, read_ids, sources_of
from megatron_fdd.data.store.identity import STORE_FILE, StoreIdentity, check_same, write_identity
from megatron_fdd.data.store.lens import lacks_lens, write_stored_lens
from megatron_fdd.data.store.store import Store
from megatron_fdd.data.store.whole_file import sweep
from megatron_fdd.data.stream.folder import sweep_stream, write_window
from megatron_fdd.host import console
from megatron_fdd.host.disk import check_folder, explain, writing
from megatron_fdd.host.process import is_first_rank
from megatron_fdd.host.together import together
from megatron_fdd.plan.megatron_errors import in_one_line, is_from_here
from megatron_fdd.teach.engine import Engine, PreparedTeacher
from megatron_fdd.teach.follow import check_window, follow
from megatron_fdd.teach.following import Following
from megatron_fdd.teach.megatron_teacher import MegatronTeacher
from megatron_fdd.teach.produce import produce
from megatron_fdd.teach.progress import TeachProgress, keep_rate
from megatron_fdd.teach.survey import Survey, look
from megatron_fdd.teach.work import batches, own_sources

# Tokens of a unit whose logits are compared with the lens: with 256,000 words these are 128 MB.
_COMPARED_TOKENS = 128


def teach(request: TeachRequest) -> None:
    """Compute what the store lacks of the training's data; with --dry-run only say it.

    Collectives: those of the teacher; a few gathers of objects.

    Raises:
        ValueError: something given is wrong, does not fit the store, or cannot be read or written.
    """
    teacher = _prepared(request)
    teacher.start()
    with _kept_log(request):
        _teach(request, teacher)


def _teach(request: TeachRequest, teacher: PreparedTeacher) -> None:
    update_train_iters(teacher.args)  # from --train-samples
    sources = sources_of(train_valid_test_provider(get_train_valid_test_num_samples()), teacher.args)
    sources = own_sources(request, teacher.args, sources)
    if request.follow is not None:
        _follow(request, request.follow, teacher, sources)
        return
    survey = look(request, teacher, sources)
    if request.dry_run:
        return
    lacks = [False]
    with together():
        if is_first_rank():
            lacks[0] = lacks_lens(request.store)
    dist.broadcast_object_list(lacks, src=0)
    if survey.units or lacks[0]:
        _compute(request, teacher, sources, survey)
    else:
        console.say(
            "Nothing is to be computed, so --teacher was not loaded, and its weights were not compared with those that "
            "the store was made with. Features of other weights need another store."
        )
    with together():
        if is_first_rank():
            keep(request.store, survey.counted)
            _save_index(request.store, is_changed=bool(survey.units))


@contextlib.contextmanager
def _kept_log(request: TeachRequest) -> Iterator[None]:
    """Give the ranks' logs one place, and say it; what only looks through the data has none unless it was named.

    A place that was not named is removed where all goes well. Collectives: one broadcast of a name over all ranks.
    """
    folder, name = request.log_folder, [""]
    if folder is None and not request.dry_run:
        with together():
            if is_first_rank() and console.is_divided():
                name[0] = Path(tempfile.mkdtemp(prefix="fdd-teach-")).name
        dist.broadcast_object_list(name, src=0)
        folder = Path(tempfile.gettempdir(), name[0]) if name[0] else None  # each machine's own
    log = None if folder is None else console.keep_log(folder)
    until = "" if request.log_folder is not None else ", until all has gone well"
    where = "" if log is None else f"; Megatron's own output: {log.with_name('rank*.log')}{until}"
    console.say(f"looking through the data{where}")
    yield
    if log is not None and request.log_folder is None:
        with contextlib.suppress(OSError):
            log.unlink()
            log.parent.rmdir()  # by the last rank


def _compute(
    request: TeachRequest, teacher: PreparedTeacher, sources: Sequence[Source], survey: Survey
) -> None:
    """Load the teacher, and write its lens, if there is none, and the features of all units."""
    store = request.store
    with together():
        check_folder("--store", store, store)
    console.say("loading the teacher")
    engine = teacher.engine()
    with together():
        if is_first_rank():
            _open_folder(store, engine.identity, teacher.companions)
    (example,) = read_ids(sources, [survey.example])
    _write_lens(engine, store, [example[:_COMPARED_TOKENS]])
    if not survey.units:
        return
    num_tokens = sum(unit.last - unit.first for unit in survey.units)
    started_s = time.perf_counter()
    with TeachProgress(num_tokens, is_shown=is_first_rank()) as progress:
        produce(engine, store, sources, batches(survey.units, request.batch_tokens), progress)
    dist.barrier()
    seconds = time.perf_counter() - started_s
    console.say(f"{num_tokens} tokens in {seconds:.1f} s, {num_tokens / seconds:.0f} tokens/s")
    if is_first_rank() and progress.tokens_per_s is not None:
        keep_rate(store, progress.tokens_per_s)


def _follow(
    request: TeachRequest, following: Following, teacher: PreparedTeacher, sources: Sequence[Source]
) -> None:
    """Load the teacher, begin the stream or join it, and make what is asked for."""
    store = request.store
    with together():
        check_folder("--store", store, store)
        if is_first_rank() and (store / STORE_FILE).exists():
            check_same(store, teacher.outline, teacher.unknown)
        check_window(following, teacher.outline, teacher.args.seq_length)
    console.say("loading the teacher")
    engine = teacher.engine()
    with together():
        if is_first_rank():
            _open_folder(store, engine.identity, teacher.companions)
            write_window(store, following.window_bytes)  # before the lens, for which a training waits
    _write_lens(engine, store, [first_unit(sources)[:_COMPARED_TOKENS]])
    follow(engine, store, request.batch_tokens, following.idle_s)


def _prepared(request: TeachRequest) -> PreparedTeacher:
    """Read and check the command line for the engine that it names."""
    if request.engine == "megatron":
        return MegatronTeacher(request)
    if request.engine == "vllm":
        from megatron_fdd.teach.vllm.teacher import VllmTeacher

        return VllmTeacher(request)
    from megatron_fdd.teach.transformers_teacher import TransformersTeacher  # whose imports take seconds

    return TransformersTeacher(request)


def _open_folder(store: Path, identity: StoreIdentity, companions: Path) -> None:
    """Make the store, or join it; put the teacher's tokenizer beside it."""
    write_identity(store, identity)
    with writing("--store", store):
        carry_companions(companions, store)
    if count := sweep(store) + sweep_stream(store):
        console.say(f"{store}: removed {count} file(s) that killed producers had left")


def _write_lens(engine: Engine, store: Path, units: Sequence[Ids]) -> None:
    """Compare the teacher's lens with the teacher's own logits, and write it where the store has none."""
    with together():
        lens = engine.lens(units)
        if lens is not None and engine.replica == 0:
            write_stored_lens(store, lens)
            console.say(
                f"lens: norm and head give the teacher's own logits to {lens.error:.1e} of the largest",
                is_chosen=True,
            )


def _save_index(store: Path, *, is_changed: bool) -> None:
    """Write the index, with which trainings open the store at once; a store that had all may be one to be read only."""
    made = Store.open(store, "--store")
    with contextlib.nullcontext() if is_changed else contextlib.suppress(ValueError):
        made.save_index()
    console.say(f"{store}: {len(made.index)} units, {made.index.num_tokens} tokens")


def main() -> int:
    """Run as `sys.argv` says. Return the exit status, which is 1 after an error that the user can correct."""
    try:
        teach(parse(sys.argv[1:]))
    except KeyboardInterrupt as interrupt:
        console.complain("fdd teach: interrupted; the same command goes on")
        return status_after(interrupt)
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
