"""What there is to do for a producer: told, and refused where it does not fit, before the teacher is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.distributed as dist

from megatron_fdd.data.store.counted import Counted, count_units
from megatron_fdd.data.store.coverage import RunUnits, Source, Table, Unit, places_of
from megatron_fdd.data.store.identity import STORE_FILE, StoreIdentity, check_same
from megatron_fdd.data.store.origin import cuts_rows
from megatron_fdd.data.store.segment import segment_bytes
from megatron_fdd.data.store.store import Store
from megatron_fdd.host import console
from megatron_fdd.host.bar import hours
from megatron_fdd.host.disk import free_bytes, sized
from megatron_fdd.host.together import together
from megatron_fdd.teach.engine import PreparedTeacher
from megatron_fdd.teach.progress import known_rate
from megatron_fdd.teach.request import TeachRequest
from megatron_fdd.teach.work import part_of


@dataclass(frozen=True, slots=True)
class Survey:
    """What is to be done.

    Attributes:
        units: this producer's part of the units that the store lacks.
        example: a unit of the data, on which the lens is compared.
        counted: all units of the run, on rank 0 alone.
    """

    units: list[Unit]
    example: Unit
    counted: Counted


def look(request: TeachRequest, teacher: PreparedTeacher, sources: Sequence[Source]) -> Survey:
    """Find out what is missing, and say it. Nothing is written, and the teacher need not be loaded.

    Collectives over all ranks: those of `count_units`, a few all-gathers, and one broadcast of a table of units.

    Raises:
        ValueError: the data have no token, the store is another teacher's, cannot be read, or has no room for what is
            missing. The same on every rank.
    """
    is_first = dist.get_rank() == 0
    with together():
        store = _opened(request, teacher) if is_first else None
    counted = count_units(sources, request.store)
    found: list[tuple[Table, Table] | None] = [None]
    with together():
        if counted.units is not None:
            units = counted.units
            if not len(units.table):
                raise ValueError("the training of these flags reads no token: give --train-iters and data")
            missing = units.table if store is None else units.missing(store.index)
            identity = teacher.outline if store is None else store.identity
            own = part_of(missing, request.part)
            _say_run(units, is_cut=cuts_rows(sources))
            _say_work(request, identity, missing, own)
            _check_room(request.store, identity, missing)
            found[0] = own, units.table[:1]
    dist.broadcast_object_list(found, src=0)  # tables: as objects a million units would take 190 MB
    assert found[0] is not None
    to_do, example = (places_of(table) for table in found[0])
    return Survey(to_do, example[0], counted)


def _opened(request: TeachRequest, teacher: PreparedTeacher) -> Store | None:
    """Open the store, if there is one. Refuse another teacher's, as far as is known before this one is loaded."""
    if not (request.store / STORE_FILE).exists():
        return None
    check_same(request.store, teacher.outline, teacher.unknown)
    store = Store.open(request.store, "--store")
    store.check_segments()
    return store


def _say_run(units: RunUnits, *, is_cut: bool) -> None:
    """Say what the run reads, and what of it a second epoch would read again."""
    different = len(units.table)
    again = units.num_read - different
    console.say(
        f"The run reads {units.num_read} units of {units.tokens_read} tokens; {different} are different, {again} are "
        f"read again ({again / max(units.num_read, 1):.0%})."
    )
    console.say(
        "A second epoch would read other rows of text: --fdd-text-units documents makes units that are read again."
        if is_cut
        else "A second epoch would read all of these again."
    )


def _say_work(request: TeachRequest, identity: StoreIdentity, missing: Table, own: Table) -> None:
    """Say how much there is to compute, how long it takes if that is known, and how much room there is."""
    tokens = int((own["last"] - own["first"]).sum(dtype=np.int64))
    size = tokens * identity.token_bytes * len(identity.blocks)
    part = "" if request.part[1] == 1 else f", part {request.part[0]}/{request.part[1]}"
    rate = known_rate(request.store)
    time = f"; {hours(tokens / rate)} at the last producer's {rate:.0f} tokens/s" if len(own) and rate else ""
    console.say(
        f"{request.store}: {len(missing)} of them are missing{part}. To compute: {len(own)} units, {tokens} tokens, "
        f"{sized(size)} ({identity.form}, {len(identity.blocks)} blocks){time}. Free there: "
        f"{sized(free_bytes(request.store))}."
    )


def _check_room(store: Path, identity: StoreIdentity, missing: Table) -> None:
    """Refuse a store that cannot take all that is missing, other producers' parts too."""
    need = segment_bytes(
        (missing["last"] - missing["first"]).astype("i8"), len(identity.blocks), identity.token_bytes
    )
    free = free_bytes(store)
    if need > free:
        raise ValueError(
            f"--store {store}: what is missing takes {sized(need)} ({need} bytes), and {sized(free)} "
            f"({free} bytes) are free there: make room, give another place, a smaller --form or fewer --blocks"
        )
