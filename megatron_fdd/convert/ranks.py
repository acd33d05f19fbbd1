"""The ranks of a conversion: each rank sees the whole model and converts a part of its tensors."""

from __future__ import annotations

import dataclasses
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_fdd.convert.hf_writer import new_folder, unfinished_name
from megatron_fdd.host import rehearsal
from megatron_fdd.host.disk import naming, writing
from megatron_fdd.host.together import together

# Ranks wait for a rank that writes a large file; torchrun notices ranks that died.
_PATIENCE = timedelta(days=1)
_TOKEN_FILE = "seen-by-every-rank"


@contextmanager
def conversion_ranks() -> Iterator[Any]:
    """Yield the groups of ranks that each see the whole model and share its tensors among them.

    These are torchrun's ranks, or one rank without torchrun, over gloo. The ProcessGroupCollection holds groups of
    one rank only, so that a model built with it is whole. If Megatron has no parallel state, one is made (its modules
    ask for it) and ended afterwards; environment variables are restored. Without a GPU, the CPU rehearsal is switched
    on. torch's operators take one thread each meanwhile: a conversion has threads of its own.

    Collectives over all ranks: making the groups.
    """
    if rehearsal.is_wanted():
        rehearsal.start()
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    environment, num_threads = dict(os.environ), torch.get_num_threads()
    torch.set_num_threads(1)
    own_world = not dist.is_initialized()
    if own_world and "RANK" in os.environ:
        dist.init_process_group("gloo", timeout=_PATIENCE)
    elif own_world:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    alone = None
    own_state = not parallel_state.model_parallel_is_initialized()
    try:
        if own_state:
            parallel_state.initialize_model_parallel()
        alone, _ = dist.new_subgroups(1)
        groups = ProcessGroupCollection()
        for field in dataclasses.fields(groups):
            setattr(groups, field.name, alone)
        yield groups
    finally:
        # A GPTModel writes its choice of attention into NVTE_* variables, which would stop a run that starts later.
        os.environ.clear()
        os.environ.update(environment)
        torch.set_num_threads(num_threads)
        if alone is not None:
            dist.destroy_process_group(alone)
        if own_state:
            parallel_state.destroy_model_parallel()
        if own_world:
            dist.destroy_process_group()


@contextmanager
def shared_new_folder(final: Path, flag: str) -> Iterator[Path]:
    """Do what `new_folder` does for all ranks together; the folder appears when every rank has ended its part.

    Collectives: a broadcast and all-gathers over all ranks.

    Raises:
        ValueError: `final`, the value of `flag`, exists and is not empty, cannot be written, or lies where some rank
            cannot see it; an error of `new_folder` on rank 0. The same on every rank.
    """
    rank_zero = dist.get_rank() == 0
    with writing(flag, final), ExitStack() as stack:
        token = [uuid.uuid4().hex]
        with together():
            folder = stack.enter_context(new_folder(final, flag)) if rank_zero else unfinished_name(final)
            if rank_zero:
                (folder / _TOKEN_FILE).write_text(token[0])
        dist.broadcast_object_list(token, src=0)
        with together():
            seen = folder / _TOKEN_FILE
            if not seen.is_file() or seen.read_text() != token[0]:
                raise ValueError(
                    f"{flag} {final} is not the same folder for every rank: give a path on a file system that all "
                    "nodes share"
                )
        if rank_zero:
            (folder / _TOKEN_FILE).unlink()
        with writing(flag, final), naming(folder, final):  # tells the room before there is more again
            yield folder
        dist.barrier()
        with together():  # the last steps of rank 0 can fail too
            stack.close()


def owners(sizes: Sequence[int], ranks: int) -> list[int]:
    """Choose the rank that takes each piece of work; ranks get contiguous runs of about the same total size."""
    total, done = max(sum(sizes), 1), 0
    result = []
    for size in sizes:
        result.append(min((2 * done + size) * ranks // (2 * total), ranks - 1))
        done += size
    return result
