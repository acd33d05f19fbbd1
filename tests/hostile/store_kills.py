"""Kill producers and readers of a store again and again; in the end every byte is what was written.

    python -m tests.hostile.store_kills  # 200 kills; tests/hostile/STORE_KILLS.md has the last result
    python -m tests.hostile.store_kills --toy TOY --toy-kills 4  # and some of whole `fdd teach` runs

Four producers at a time write the units of a new store in orders of their own, some keep the index, and one reader
compares what it finds. One of them is killed (SIGKILL) after a random time, and started again. When a store had its
share of kills, a last producer ends the work, and all of the store is compared. TOY is a folder with `teacher`, a small
Megatron checkpoint with its tokenizer, and `text`, a data set that was tokenised with it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from megatron_fdd.data.store import upkeep
from megatron_fdd.data.store.identity import write_identity
from megatron_fdd.data.store.lens import LENS_FILE
from megatron_fdd.data.store.segment import SegmentWriter, segment_path
from megatron_fdd.data.store.store import Store
from megatron_fdd.data.store.unit import unit_key
from tests.data.store.made import IDENTITY, P, T, Unit, opened, read_whole, unit

UNITS_A_SEGMENT, NUM_UNITS = 8, 600
PRODUCERS, KILLS_A_STORE = 4, 12
LONGEST_S = 0.15
TOY_FLAGS = (
    "--seq-length 16 --micro-batch-size 2 --global-batch-size 8 --train-iters 200 --eval-interval 100 --eval-iters 1 "
    "--seed 7 --split 80,20,0 --tokenizer-type HuggingFaceTokenizer --fdd-layers 2"
).split()


def made(number: int) -> Unit:
    """Return the n-th unit, of 1 to 200 tokens."""
    return unit(1 + 37 * number % 200, number)


def produce(path: Path, seed: int, num_units: int = NUM_UNITS) -> None:
    """Write the units that a store lacks, in an order of one's own."""
    write_identity(path, IDENTITY)
    store, order = opened(path), random.Random(seed)
    numbers = [number for number in range(num_units) if store.index.find(unit_key(made(number)[0])) is None]
    if seed % 2:  # the others write the same segments, in the same order
        order.shuffle(numbers)
    writer = SegmentWriter(path, IDENTITY.digest, T, P, most_units=UNITS_A_SEGMENT)
    for number in numbers:
        writer.add(*made(number))
        if order.random() < 0.02:
            opened(path).save_index()
    writer.flush()
    opened(path).save_index()


def read(path: Path, seed: int) -> None:
    """Compare what a store has again and again; end with status 1 at a difference."""
    order = random.Random(seed)
    while True:
        store = opened(path)
        for number in order.sample(range(NUM_UNITS), 40):
            ids, states = made(number)
            if store.index.find(unit_key(ids)) is not None and not np.array_equal(
                read_whole(store, ids), states
            ):
                raise AssertionError(f"unit {number} differs")


def differences(path: Path, num_units: int = NUM_UNITS) -> int:
    """Count units that are not there or not what was written, and segments that are damaged."""
    store, wrong = opened(path), 0
    for number in range(num_units):
        ids, states = made(number)
        wrong += store.index.find(unit_key(ids)) is None or not np.array_equal(read_whole(store, ids), states)
    return wrong + len(upkeep.check_store(path).damaged)


def started(run: Callable[[Path, int], None], path: Path, seed: int) -> BaseProcess:
    """Start one in a process of its own."""
    process = multiprocessing.get_context("fork").Process(target=run, args=(path, seed), daemon=True)
    process.start()
    return process


def kill_at_one_store(path: Path, kills: int, chance: random.Random) -> dict[str, int]:
    """Kill so often, or until the work is done, then end it, and compare; return what was counted."""
    write_identity(path, IDENTITY)
    roles = [produce] * PRODUCERS + [read]
    running = [started(role, path, chance.randrange(2**30)) for role in roles]
    counts = dict.fromkeys(("producers", "readers", "leftovers", "failed", "differences"), 0)
    while counts["producers"] + counts["readers"] < kills and len(opened(path).index) < NUM_UNITS:
        time.sleep(chance.uniform(0, LONGEST_S))
        place = chance.randrange(len(roles))
        process = running[place]
        if process.is_alive():
            process.kill()
            counts["readers" if roles[place] is read else "producers"] += 1
        process.join()
        counts["failed"] += process.exitcode not in (0, -signal.SIGKILL)
        running[place] = started(roles[place], path, chance.randrange(2**30))
    for process in running:
        process.kill()
        process.join()
    counts["leftovers"] = sum(1 for _ in path.rglob(".*.unfinished"))
    last = started(produce, path, 0)
    last.join()
    counts["failed"] += last.exitcode != 0
    counts["differences"] = differences(path)
    return counts


def teach_command(toy: Path, store: Path) -> list[str]:
    """Return the command of a whole producer."""
    own = ("--engine", "megatron", "--teacher", toy / "teacher", "--store", store, "--form", "float32")
    data = ("--data-path", toy / "text", "--tokenizer-model", toy / "teacher" / "tokenizer")
    return [
        sys.executable,
        "-c",
        "from megatron_fdd.cli import main; main()",
        "teach",
        *map(str, (*own, *data)),
        *TOY_FLAGS,
    ]


def kill_whole_runs(toy: Path, kills: int, folder: Path, chance: random.Random) -> dict[str, int]:
    """Kill `fdd teach` while it writes, let it end, and compare with a run that was not killed."""
    counts = {"whole runs": 0, "differences": 0}
    subprocess.run(teach_command(toy, folder / "whole"), check=True, stdout=subprocess.DEVNULL)
    while counts["whole runs"] < kills:
        with subprocess.Popen(
            teach_command(toy, folder / "killed"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        ) as process:
            while process.poll() is None and not (folder / "killed" / LENS_FILE).exists():
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 1.0))
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                counts["whole runs"] += 1
            else:
                shutil.rmtree(folder / "killed")
    subprocess.run(teach_command(toy, folder / "killed"), check=True, stdout=subprocess.DEVNULL)
    wanted, found = Store.open(folder / "whole", "--store"), Store.open(folder / "killed", "--store")
    counts["units"] = len(wanted.index)
    counts["differences"] += compared(wanted, found) + len(upkeep.check_store(folder / "killed").damaged)
    return counts


def compared(wanted: Store, found: Store) -> int:
    """Count the units of one store that another does not have alike."""
    wrong, numbers = 0, range(len(wanted.identity.blocks))
    for name in wanted.index.names:
        tensors, first = load_file(segment_path(wanted.path, name)), 0
        for length in tensors["lengths"].tolist():
            ids = tensors["ids"][first : first + length]
            wrong += not np.array_equal(*(store.read(ids, numbers, 0, length) for store in (wanted, found)))
            first += length
    return wrong


def main() -> int:
    """Kill and print; return the exit status, 1 after a difference."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--toy", type=Path, help="folder with a small teacher and its text")
    parser.add_argument("--toy-kills", type=int, default=0, help="of whole runs of fdd teach (%(default)s)")
    args = parser.parse_args()
    chance, begun_s = random.Random(args.seed), time.monotonic()
    total: dict[str, int] = {}
    folder = Path(tempfile.mkdtemp())
    try:
        while total.get("producers", 0) + total.get("readers", 0) < args.kills:
            counts = {"stores": 1, **kill_at_one_store(folder / "store", KILLS_A_STORE, chance)}
            total = {name: total.get(name, 0) + count for name, count in counts.items()}
            shutil.rmtree(folder / "store")
        if args.toy_kills:
            counts = kill_whole_runs(args.toy.absolute(), args.toy_kills, folder, chance)
            total = {name: total.get(name, 0) + counts.get(name, 0) for name in (*total, *counts)}
    finally:
        shutil.rmtree(folder)
    print(f"{total}, {time.monotonic() - begun_s:.0f} s")
    return int(total["differences"] + total["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main())
