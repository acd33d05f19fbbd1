"""A store of features: reading against bare `pread` of the same ranges, look-ups, and opening a million units.

    python -m benchmarks.feature_store                    # the quickstart's teacher, units of 512 tokens
    python -m benchmarks.feature_store --folder /scratch  # on another disk
    python -m benchmarks.feature_store --tokens 4096 --units 32  # as long as sequences that context parallelism cuts

Reading: every implementation reads the same ranges of the same units in the same random order; rounds alternate, and
the best of each counts. All keep the last 8 samples, as a batch does, so that none reads into memory that is warm from
the sample before. `FeatureReader` reads batches of 8 as a loader does, into memory that is used again; the floor reads
the same ranges into such memory and sums them, and does nothing else. Cold: the system's cache is emptied of these
files before each round. Times are by the clock, because a batch is read by two threads: leave the machine alone. A rank
under context parallelism reads two ranges of some blocks. Exits 1 when a goal is missed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
import tracemalloc
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import xxhash
from torch.utils.data import default_collate

from benchmarks import lines
from benchmarks.measure import MIB, RESULTS, origin
from megatron_fdd.data.store.identity import StoreIdentity, write_identity
from megatron_fdd.data.store.index import _RECORD, Index
from megatron_fdd.data.store.segment import SUM_TOKENS, SegmentWriter, segment_names, segment_path
from megatron_fdd.data.store.slots import Slots
from megatron_fdd.data.store.store import Store
from megatron_fdd.data.store.taught import FeatureReader, rank_ranges
from megatron_fdd.data.store.unit import as_ids, unit_key

BATCH = 8
WIDTH, TOKENS, BLOCKS = 576, 512, (6, 12, 18, 24, 30)
RAW, FLOOR, READ, READER = "os.pread", "preadv + xxh3", "Store.read", "FeatureReader.read"
# The goals.
READING, LOOK_UP_S, OPEN_S, OPEN_MIB = 0.8, 20e-6, 1.0, 100.0
MILLION = 10**6

Pass = Callable[[], int]


@dataclass(frozen=True, slots=True)
class Shape:
    """What a rank reads of every unit: its blocks, and ranges of positions."""

    name: str
    blocks: tuple[int, ...]
    ranges: tuple[tuple[int, int], ...]


def shapes(num_tokens: int) -> tuple[Shape, ...]:
    """Return what ranks read of units of so many tokens."""
    return (
        Shape("all blocks, whole units", BLOCKS, ((0, num_tokens),)),
        Shape("2 blocks, context parallel 2", BLOCKS[:2], rank_ranges(num_tokens, context=(0, 2))),
        Shape("1 block, whole units", BLOCKS[-1:], ((0, num_tokens),)),
    )


def identity() -> StoreIdentity:
    """Return the identity of a store of the quickstart's teacher in bf16."""
    return StoreIdentity(
        engine="megatron",
        teacher="made up",
        weights="",
        final_norm="",
        architecture="",
        num_layers=BLOCKS[-1],
        hidden_size=WIDTH,
        vocab_size=49152,
        blocks=list(BLOCKS),
        form="bf16",
        token_bytes=2 * WIDTH,
        ran={"dtype": "bfloat16"},
    )


def write_store(path: Path, num_units: int, num_tokens: int) -> None:
    """Write a store of random units."""
    about, random = identity(), np.random.default_rng(1)
    write_identity(path, about)
    writer = SegmentWriter(path, about.digest, len(BLOCKS), about.token_bytes)
    for number in range(num_units):
        shape = (len(BLOCKS), num_tokens, about.token_bytes)
        writer.add(unit_ids(number, num_tokens), random.integers(0, 256, shape, np.uint8))
    writer.flush()
    Store.open(path, "--folder").save_index()


def unit_ids(number: int, num_tokens: int) -> np.ndarray:
    """Return the ids of a unit."""
    return as_ids(np.random.default_rng(number).integers(0, 49152, num_tokens))


def passes(path: Path, shape: Shape, num_units: int, num_tokens: int) -> dict[str, Pass]:
    """Return what reads all units once, by name; each returns the bytes that were asked for."""
    store = Store.open(path, "--folder")
    order = np.random.default_rng(7).permutation(num_units).tolist()
    units = [unit_ids(number, num_tokens) for number in order]
    numbers = [BLOCKS.index(block) for block in shape.blocks]
    width = store.identity.token_bytes
    places = []
    for ids in units:
        place = store.index.find(unit_key(ids))
        assert place is not None
        begin = int(store.index.layouts[place.segment, 2]) + place.start * len(BLOCKS) * width
        for first, last in shape.ranges:
            for number in numbers:
                at = begin + (number * num_tokens + first) * width
                places.append((place.segment, (last - first) * width, at))
    files = [os.open(segment_path(path, name), os.O_RDONLY) for name in store.index.names]
    ones = torch.ones(num_tokens)
    samples = [
        {"tokens": torch.from_numpy(ids).long(), "token_mask": ones, "loss_mask": ones} for ids in units
    ]
    batches = [default_collate(samples[at : at + BATCH]) for at in range(0, len(units), BATCH)]
    reader, count = FeatureReader(store, shape.blocks, shape.ranges), len(places) // len(units)
    size = count * places[0][1]
    slots = Slots(BATCH * size, 0, 2)
    used_again = memoryview(bytearray(2 * BATCH * size))

    def raw(number: int) -> object:
        return [os.pread(files[segment], size, at) for segment, size, at in places[number * count :][:count]]

    def floor(number: int) -> None:
        into = used_again[number % (2 * BATCH) * size :]
        for segment, part, at in places[number * count :][:count]:
            os.preadv(files[segment], [into[:part]], at)
            for first in range(0, part, SUM_TOKENS * width):
                xxhash.xxh3_64_intdigest(into[first : min(first + SUM_TOKENS * width, part)])
            into = into[part:]

    def read(number: int) -> object:
        return [store.read(units[number], numbers, first, last) for first, last in shape.ranges]

    def read_batch(number: int) -> object:
        slot = slots.take(0, reader.shape(len(batches[number]["tokens"])))
        assert slot is not None
        reader.read(batches[number], slot.array)
        return slot.tensor()

    def whole(one: Callable[[int], object], parts: int = len(units), keeps: int = BATCH) -> int:
        kept = deque((one(number) for number in range(parts)), maxlen=keeps)
        kept.clear()
        return size * len(units)

    return {
        RAW: lambda: whole(raw),
        FLOOR: lambda: whole(floor),
        READ: lambda: whole(read),
        READER: lambda: whole(read_batch, len(batches), 1),
    }


def forget(path: Path) -> None:
    """Empty the system's cache of the store's segments."""
    for name in segment_names(path):
        file = os.open(segment_path(path, name), os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def rates(path: Path, made: Mapping[str, Pass], rounds: int, *, cold: bool) -> dict[str, float]:
    """Return the best rate of each, in bytes a second; rounds alternate."""
    best = dict.fromkeys(made, 0.0)
    for number in range(rounds):
        for name in list(made) if number % 2 else reversed(list(made)):
            if cold:
                forget(path)
            started = time.perf_counter()
            count = made[name]()
            best[name] = max(best[name], count / (time.perf_counter() - started))
    return best


def write_large(path: Path, num_units: int) -> list[bytes]:
    """Write the index of many units, and empty segments; return some of the keys."""
    write_identity(path, identity())
    random = np.random.default_rng(3)
    names = sorted(random.bytes(16).hex() for _ in range(-(-num_units // 64)))
    for name in names:
        segment_path(path, name).parent.mkdir(parents=True, exist_ok=True)
        segment_path(path, name).touch()
    records = np.zeros(num_units, _RECORD)
    records["high"] = np.sort(random.integers(0, 2**64, num_units, np.uint64))
    records["low"] = random.integers(0, 2**64, num_units, np.uint64)
    records["segment"], records["length"] = np.arange(num_units) // 64, TOKENS
    layouts = np.full((len(names), 5), 64, np.int64)
    Store(path, identity(), Index(names, layouts, records)).save_index()
    chosen = records[random.permutation(num_units)[:50_000]]
    return [int(each["high"]).to_bytes(8, "big") + int(each["low"]).to_bytes(8, "big") for each in chosen]


def opening(path: Path, keys: Sequence[bytes], rounds: int) -> dict[str, float]:
    """Return seconds of opening a large store, its MiB, and seconds of a look-up, one by one and in bulk."""
    found = {"open_s": float("inf"), "find_s": float("inf"), "has_s": float("inf")}
    before = resident()  # the first one: later ones use memory that was given back
    store = Store.open(path, "--folder")
    found["resident_mib"] = (resident() - before) / MIB
    for _ in range(rounds):
        started = time.perf_counter()
        store = Store.open(path, "--folder")
        found["open_s"] = min(found["open_s"], time.perf_counter() - started)
        for name, look_up in (
            ("find_s", partial(find_all, store, keys)),
            ("has_s", partial(store.index.has, keys)),
        ):
            started = time.process_time()
            look_up()
            found[name] = min(found[name], (time.process_time() - started) / len(keys))
    tracemalloc.start()
    store = Store.open(path, "--folder")
    found["traced_mib"] = tracemalloc.get_traced_memory()[1] / MIB
    tracemalloc.stop()
    return found


def find_all(store: Store, keys: Sequence[bytes]) -> None:
    """Look up keys one by one; each is there."""
    assert all(store.index.find(key) is not None for key in keys)


def resident() -> int:
    """Return the bytes of memory that this process holds, mapped files included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def main() -> int:
    """Measure and print; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, help="where the stores are written for the while (the system's)"
    )
    parser.add_argument("--units", type=int, default=128, help="to read (%(default)s)")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of a unit (%(default)s)")
    parser.add_argument("--rounds", type=int, default=6, help="(%(default)s)")
    parser.add_argument("--smoke", action="store_true", help="that it runs: few units, nothing recorded")
    args = parser.parse_args()
    num_units, rounds, large = (4, 1, 1000) if args.smoke else (args.units, args.rounds, MILLION)
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    torch.set_num_threads(1)
    try:
        write_store(folder / "small", num_units, args.tokens)
        found: dict[str, dict[str, float]] = {}
        head = "".join(f"{name:>22}" for name in (FLOOR, READ, READER))
        print(f"{'GB/s (of os.pread, of the floor)':<36}{RAW:>10}{head}")
        for shape in shapes(args.tokens):
            made = passes(folder / "small", shape, num_units, args.tokens)
            for cold in (False, True):
                row = found[f"{shape.name}, {'cold' if cold else 'warm'}"] = rates(
                    folder / "small", made, rounds, cold=cold
                )
                cells = [
                    f"{row[name] / 1e9:.2f} ({row[name] / row[RAW]:.2f}, {row[name] / row[FLOOR]:.2f})"
                    for name in (FLOOR, READ, READER)
                ]
                head = "".join(f"{cell:>22}" for cell in cells)
                print(f"{list(found)[-1]:<36}{row[RAW] / 1e9:>10.2f}{head}", flush=True)
        opened = opening(folder / "large", write_large(folder / "large", large), rounds)
    finally:
        shutil.rmtree(folder)
    print(
        f"\n{large} units: opened in {opened['open_s']:.3f} s, {opened['resident_mib']:.0f} MiB resident, mapped "
        f"ones included, at most {opened['traced_mib']:.0f} MiB allocated; a look-up {opened['find_s'] * 1e6:.1f} us, "
        f"in bulk {opened['has_s'] * 1e6:.2f} us"
    )
    if args.smoke:
        return 0
    lines.write(
        RESULTS,
        "benchmark",
        {**origin(), "benchmark": "feature_store", "tokens": args.tokens, "rows": found, "opening": opened},
    )
    largest = max(opened["resident_mib"], opened["traced_mib"])
    is_slow = any(row[READER] < READING * row[RAW] for row in found.values()) or opened["find_s"] > LOOK_UP_S
    return int(is_slow or opened["open_s"] > OPEN_S or largest > OPEN_MIB)


if __name__ == "__main__":
    sys.exit(main())
