"""The ranks of a conversion: each sees the whole model, and takes a part of its tensors."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_fdd import rehearsal
from megatron_fdd.convert.hf_writer import new_folder, unfinished_name


@contextmanager
def conversion_ranks() -> Iterator[Any]:
    """Ranks that each see the whole model and share its tensors among them; yields their groups.

    Under torchrun those of its ranks, else one rank, over gloo. The ProcessGroupCollection holds groups of one
    rank only, so that a model built with it is whole. Megatron's parallel state is made if there is none (its
    modules ask for it) and then ended again. Without a GPU the CPU rehearsal is switched on.

    Collectives over all ranks: making the groups.
    """
    if rehearsal.is_wanted():
        rehearsal.start()
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    own_world = not dist.is_initialized()
    if own_world and "RANK" in os.environ:
        dist.init_process_group("gloo")
    elif own_world:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
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
        if own_state:
            parallel_state.destroy_model_parallel()
        if own_world:
            dist.destroy_process_group()


def raise_together(error: BaseException | None) -> None:
    """Raise on every rank what went wrong on any; for the end of work that ranks do apart.

    Collectives: one all-gather over all ranks.

    Raises:
        ValueError: `error` of the first rank that has one.
    """
    told: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(told, None if error is None else str(error) or type(error).__name__)
    first = next((text for text in told if text is not None), None)
    if first is not None:
        raise ValueError(first) from error


@contextmanager
def shared_new_folder(final: Path) -> Iterator[Path]:
    """`new_folder` for all ranks together; it appears when every rank has ended its part.

    Collectives: barriers, and one all-gather, over all ranks.

    Raises:
        ValueError: `final` exists and is not empty, or lies where some rank cannot see it.
    """
    rank_zero = dist.get_rank() == 0
    with new_folder(final) if rank_zero else nullcontext(unfinished_name(final)) as unfinished:
        dist.barrier()
        unseen = f"{final.parent} is not the same folder on every node: give a path on a shared file system"
        raise_together(None if unfinished.is_dir() else ValueError(unseen))
        yield unfinished
        dist.barrier()
    dist.barrier()


def owners(sizes: Sequence[int], ranks: int) -> list[int]:
    """Which rank takes each of some pieces of work: contiguous runs of about the same total size."""
    total, done = max(sum(sizes), 1), 0
    result = []
    for size in sizes:
        result.append(min((2 * done + size) * ranks // (2 * total), ranks - 1))
        done += size
    return result
