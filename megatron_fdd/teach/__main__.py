"""The entry point of a producer: `torchrun --nproc-per-node N -m megatron_fdd.teach --engine megatron --teacher T ...`.

`fdd teach` starts it. Behind its own flags stand those of the training whose data it reads, and of the teacher's
layout.
"""

from __future__ import annotations

import sys

from megatron_fdd.host.process import end_at_interrupt, print_error, raise_at_interrupt
from megatron_fdd.host.start import start

if __name__ == "__main__":
    end_at_interrupt()
    start()

import os
import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist
from megatron.training.initialize import initialize_megatron
from megatron.training.training import get_train_valid_test_num_samples
from tqdm import tqdm

from megatron_fdd.convert.hf_companions import carry_companions
from megatron_fdd.data.provider import train_valid_test_provider
from megatron_fdd.data.store.coverage import Coverage, Ids, Source, Unit, find_missing, read_ids, sources_of
from megatron_fdd.data.store.identity import StoreIdentity, write_identity
from megatron_fdd.data.store.lens import write_stored_lens
from megatron_fdd.data.store.store import Store
from megatron_fdd.data.store.whole_file import sweep
from megatron_fdd.host import console, rehearsal
from megatron_fdd.host.patches.helpers import use_built_helpers
from megatron_fdd.host.patches.norms import install_norms
from megatron_fdd.host.plugins import import_plugins, named_plugins
from megatron_fdd.host.process import is_first_rank
from megatron_fdd.host.together import together
from megatron_fdd.host.topology import Topology
from megatron_fdd.plan.context import StoredModel
from megatron_fdd.plan.megatron_errors import in_one_line, is_from_here
from megatron_fdd.plan.run import PreparedRun, prepare_run
from megatron_fdd.step.teacher.loading import build_teacher
from megatron_fdd.teach.engine import Engine
from megatron_fdd.teach.megatron import MegatronEngine, describe
from megatron_fdd.teach.produce import produce
from megatron_fdd.teach.request import TeachRequest, batch_sizes, chosen_blocks, parse, parser
from megatron_fdd.teach.work import batches, part_of


def teach(request: TeachRequest) -> None:
    """Compute what the store lacks of the training's data.

    Collectives: Megatron's initialization; those of `build_teacher` and of the engine; a few gathers of objects.

    Raises:
        ValueError: something given is wrong, does not fit the store, or cannot be read or written.
    """
    stored = StoredModel.find(str(request.teacher), "--teacher", to_plan=False)
    blocks = chosen_blocks(request, stored.args.num_layers)
    run = _prepare(request, blocks)
    identity = describe(run, blocks, request.form)
    _start(run)
    sources = sources_of(train_valid_test_provider(get_train_valid_test_num_samples()), run.args)
    with together():
        if is_first_rank():
            _open_folder(request, identity)
    all_batches = batches(_work(request, sources), request.batch_tokens)
    if not all_batches:
        return
    assert run.teacher is not None
    assert run.teacher_checkpoint is not None
    topology = Topology.from_megatron(sequence_parallel=run.args.sequence_parallel)
    experts = topology.with_experts(run.teacher.expert_model_parallel_size)
    engine = MegatronEngine(identity, build_teacher(run.teacher, run.teacher_checkpoint, experts), topology)
    _write_lens(engine, request.store, [read_ids(sources, all_batches[0][0])])
    started_s = time.perf_counter()
    produce(engine, request.store, sources, all_batches, shows_progress=is_first_rank(), say=console.say)
    dist.barrier()
    seconds = time.perf_counter() - started_s
    num_tokens = sum(unit.last - unit.first for batch in all_batches for unit in batch)
    console.say(f"{num_tokens} tokens in {seconds:.1f} s, {num_tokens / seconds:.0f} tokens/s")
    with together():
        if is_first_rank():
            _save_index(request.store)


def _prepare(request: TeachRequest, blocks: Sequence[int]) -> PreparedRun:
    """Prepare a run whose student is the teacher, and is never built."""
    world, teacher = os.environ.get("WORLD_SIZE", "1"), str(request.teacher)
    pairs = ",".join(f"{block}:{block}" for block in blocks)
    sizes = batch_sizes(request)
    sys.argv[1:] = [
        *("--lr", "1e-4"),
        *request.flags,
        *("--use-checkpoint-args", "--pretrained-checkpoint", teacher, "--teacher-load", teacher),
        *("--fdd-layer-pairs", pairs, "--fdd-alpha", "1", "--fdd-beta", "0"),
        *("--micro-batch-size", "1", "--global-batch-size", world),
        *("--eval-micro-batch-size", "1", "--eval-global-batch-size", world),
    ]
    if rehearsal.is_wanted():
        sys.argv[1:] = rehearsal.add_flags(sys.argv[1:])
    import_plugins(named_plugins(sys.argv[1:]))
    run = prepare_run()
    # These only say how much of the data is read.
    run.args.global_batch_size, run.args.eval_global_batch_size = sizes
    return run


def _start(run: PreparedRun) -> None:
    """Make the process groups, as Megatron's `pretrain` does, and check the files that all ranks read together."""
    log = console.keep_log(Path(tempfile.mkdtemp(prefix="fdd-teach-")))
    if log is not None:
        console.say(f"loading the teacher and the data; Megatron's own output: {log.with_name('rank*.log')}")
    use_built_helpers()
    if run.args.transformer_impl == "local":
        install_norms()
    initialize_megatron()
    run.check_files()


def _open_folder(request: TeachRequest, identity: StoreIdentity) -> None:
    """Make the store, or join it; put the teacher's tokenizer beside it."""
    write_identity(request.store, identity)
    carry_companions(request.teacher, request.store)
    if count := sweep(request.store):
        console.say(f"{request.store}: removed {count} file(s) that killed producers had left")


def _work(request: TeachRequest, sources: Sequence[Source]) -> list[Unit]:
    """Find this producer's part of what is missing, on the first rank for all.

    Collectives: one all-gather of an error, and one broadcast of a list of units.
    """
    work: list[list[Unit]] = [[]]
    with together():
        if is_first_rank():
            store = Store.open(request.store, "--store")
            total = sum(source.num_samples for source in sources)
            with tqdm(total=total, unit="sample", desc="units", disable=None) as bar:
                found = find_missing(sources, store.index, on_sample=bar.update)
            work[0] = part_of(found.missing, request.part)
            _say_work(request, store, found, work[0])
    dist.broadcast_object_list(work, src=0)
    return work[0]


def _say_work(request: TeachRequest, store: Store, found: Coverage, own: Sequence[Unit]) -> None:
    """Say before the work begins how much of it there is."""
    identity = store.identity
    unit_bytes = identity.token_bytes * len(identity.blocks)
    again = found.num_read - found.num_units
    tokens = sum(unit.last - unit.first for unit in own)
    part = "" if request.part[1] == 1 else f", part {request.part[0]}/{request.part[1]}"
    console.say(
        f"The run reads {found.num_read} units of {found.tokens_read} tokens; {found.num_units} are different, "
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
    except ValueError as error:
        console.log_traceback()
        print_error(f"megatron_fdd: error: {error if is_from_here(error) else in_one_line(error)}")
        return 1
    return 0


if __name__ == "__main__":
    if not {"-h", "--help"}.isdisjoint(sys.argv):
        parser().print_help()
        sys.exit()
    raise_at_interrupt()
    try:
        status = main()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    sys.exit(status)
