"""Whether a store has all that a run reads of it: looked up before a model is loaded, by all ranks together."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence

import numpy as np
import torch.distributed as dist

from megatron_fdd.data.flags import data_words
from megatron_fdd.data.store.counted import count_units, keep
from megatron_fdd.data.store.coverage import RunUnits, Source, places_of, read_ids
from megatron_fdd.data.store.origin import cuts_rows, whereabouts
from megatron_fdd.data.store.routed import NamedStore
from megatron_fdd.data.store.store import Store
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
    with together():
        if dist.get_rank() == 0:
            store.check_segments()
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
    hint = " (rows of text depend on --seed, --split, --seq-length and the number of samples)"
    raise ValueError(
        f"--fdd-teacher-store {store.path}: lacks {len(missing)} units of this run's data{_of(named)}, {tokens} "
        f"tokens; the first: {whereabouts(sources[first.dataset], first)}, ids {ids[:6].tolist()}"
        f"{hint if cuts_rows(sources) else ''}. To add them, in the teacher's layout: {_command(store, named)}"
    )


def _command(store: Store, named: NamedStore) -> str:
    """Return the `fdd teach` command that adds this run's units to a store."""
    identity, ran = store.identity, store.identity.ran
    words = [
        "fdd",
        "teach",
        "--engine",
        identity.engine,
        "--teacher",
        identity.teacher,
        "--store",
        str(store.path),
    ]
    words += ["--blocks", ",".join(map(str, identity.blocks)), "--form", identity.form]
    if identity.engine != "megatron":
        words += ["--dtype", ran["dtype"]]
    else:
        words += {"bfloat16": ["--bf16"], "float16": ["--fp16"]}.get(ran["dtype"], [])
        if len(fp8 := ran["fp8"].split()) == 2:
            words += ["--teacher-fp8-format", fp8[0], "--teacher-fp8-recipe", fp8[1]]
    also = ("fdd_teacher_store",) if named.name else ()  # says which data sets are this teacher's
    return shlex.join([*words, *data_words(sys.argv[1:], also)])
