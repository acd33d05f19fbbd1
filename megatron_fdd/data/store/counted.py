"""The count of a run's units: made once by all ranks, and kept in the store for the next start."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.distributed as dist
import xxhash
from safetensors import SafetensorError, safe_open

from megatron_fdd.data.store.coverage import UNIT, RunUnits, Source, count_share, joined
from megatron_fdd.data.store.identity import RUNS, STORE_FILE
from megatron_fdd.data.store.origin import identity_of_data
from megatron_fdd.data.store.whole_file import FileTensor, write_tensors
from megatron_fdd.host.bar import Bar
from megatron_fdd.host.together import together

_VERSION = "1"


@dataclass(frozen=True, slots=True)
class Counted:
    """The units of a run, known on rank 0 alone.

    Attributes:
        units: None on other ranks.
        run: identity of the run's data; None for data that have none, whose count is not kept.
        is_kept: whether the store had the count.
    """

    units: RunUnits | None
    run: str | None
    is_kept: bool


def count_units(sources: Sequence[Source], store: Path) -> Counted:
    """Count the units of a run, from what the store keeps; else the samples are dealt over all ranks.

    Collectives over all ranks: one broadcast of a flag; without a kept count two all-gathers, one of the units.

    Raises:
        ValueError: the data cannot be read. The same on every rank.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    run = identity_of_data(sources) if rank == 0 else None
    kept = None if run is None else _read(store, run)
    is_kept = [kept is not None]
    dist.broadcast_object_list(is_kept, src=0)
    if is_kept[0]:
        return Counted(kept, run, is_kept=True)
    total = sum(len(range(rank, source.num_samples, world)) for source in sources)
    with (
        together(),
        Bar(total=total, desc="looking for units", unit="sample", is_shown=rank == 0) as bar,
    ):
        share = count_share(sources, deal=(rank, world), on_sample=bar.update)
    shares = [share] * world
    dist.all_gather_object(shares, share)
    return Counted(joined(shares) if rank == 0 else None, run, is_kept=False)


def keep(store: Path, counted: Counted) -> None:
    """Write a count into its store, on rank 0; where that cannot be written the next start counts again."""
    units, run = counted.units, counted.run
    if units is None or run is None or counted.is_kept or not (store / STORE_FILE).is_file():
        return
    rows = np.ascontiguousarray(units.table).view(np.uint8)
    about = _about(run, units)
    with contextlib.suppress(ValueError, OSError):  # a store that others only read
        write_tensors(store, _path(store, run), {"units": FileTensor("U8", rows.shape, [rows])}, about)


def _read(store: Path, run: str) -> RunUnits | None:
    """Return what a store keeps of a run; None if there is nothing that can be used."""
    path = _path(store, run)
    if not path.is_file():  # a pipe would be waited for
        return None
    try:
        with safe_open(path, framework="np") as file:
            about = file.metadata() or {}
            table = file.get_tensor("units").view(UNIT)
            found = RunUnits(table, int(about["read"]), int(about["tokens"]))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None
    return found if about == _about(run, found) else None


def _about(run: str, units: RunUnits) -> dict[str, str]:
    about = {"version": _VERSION, "run": run, "read": str(units.num_read), "tokens": str(units.tokens_read)}
    total = xxhash.xxh3_64(json.dumps(about).encode())
    total.update(np.ascontiguousarray(units.table).view(np.uint8))
    return {**about, "sum": total.hexdigest()}


def _path(store: Path, run: str) -> Path:
    return store / RUNS / f"{run}.safetensors"
