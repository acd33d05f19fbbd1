"""Whether a store has all that a run reads of it: looked up before the first step, by all ranks together."""

from __future__ import annotations

import time
from collections.abc import Sequence
from shlex import quote

import numpy as np
import torch.distributed as dist

from megatron_fdd.data.store.counted import count_units, keep
from megatron_fdd.data.store.coverage import RunUnits, Source, places_of, read_ids
from megatron_fdd.data.store.origin import whereabouts
from megatron_fdd.data.store.routed import NamedStore
from megatron_fdd.host import console
from megatron_fdd.host.together import together


def check_coverage(sources: Sequence[Source], named: NamedStore) -> None:
    """Refuse a store that lacks a unit of this run's data; every unit is looked up.

    Args:
        sources: the data that this teacher teaches.

    Collectives over all ranks: one all-gather of the index's hash, those of `count_units`, and one all-gather.

    Raises:
        ValueError: says how many are missing, where the first is, and what adds them; or ranks see different stores.
            The same on every rank.
    """
    started_s, store = time.perf_counter(), named.store
    digests = [""] * dist.get_world_size()
    dist.all_gather_object(digests, store.index.digest)
    if len(set(digests)) > 1:
        raise ValueError(
            f"--fdd-teacher-store {store.path}: ranks see different segments in it; start again when fdd teach has "
            "ended and all machines see what it wrote"
        )
    counted = count_units(sources, store.path)
    with together():
        if counted.units is not None:
            _check_units(counted.units, sources, named)
            keep(store.path, counted)
            how = "which were counted before, " if counted.is_kept else ""
            console.say(
                f"all {counted.units.num_read} units of this run's data{_of(named)} are in {store.path} ({how}looked "
                f"up in {time.perf_counter() - started_s:.1f} s)"
            )


def _of(named: NamedStore) -> str:
    return f" of {named.name}" if named.name else ""


def _check_units(units: RunUnits, sources: Sequence[Source], named: NamedStore) -> None:
    """Refuse a store that lacks one of these units."""
    store = named.store
    missing = units.missing(store.index)
    if not len(missing):
        return
    [first] = places_of(missing[:1])
    (ids,) = read_ids(sources, [first])
    tokens = int((missing["last"] - missing["first"]).sum(dtype=np.int64))
    identity = store.identity
    dtype = f" --dtype {identity.ran['dtype']}" if identity.engine != "megatron" else ""
    raise ValueError(
        f"--fdd-teacher-store {store.path}: lacks {len(missing)} units of this run's data{_of(named)}, {tokens} "
        f"tokens; the first: {whereabouts(sources[first.dataset], first)}, ids {ids[:6].tolist()}. Add them with fdd "
        f"teach --engine {identity.engine} --teacher {quote(identity.teacher)} --store "
        f"{quote(str(store.path))} --blocks "
        f"{','.join(map(str, identity.blocks))} --form {identity.form}{dtype} and this "
        "run's data flags (rows of text depend on --seed, --split, --seq-length and the number of samples)"
    )
