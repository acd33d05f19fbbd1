"""Kill producers and trainings of streams again and again; what is learnt in the end is what nobody disturbed.

    python -m tests.hostile.stream_kills --toy TOY  # 200 kills; tests/hostile/STREAM_KILLS.md has the last result

Two producers replay a finished store (`benchmarks/replay.py`), and a training of two or four processes follows the
stream. One of the three is killed (SIGKILL, of a training all processes or one) after a random time, and started again,
until the training is complete. Its metrics, bit for bit, must be those of a training with the finished store. TOY is a
folder with `teacher` and `student`, small Megatron checkpoints, and `text`, a data set for the teacher's tokenizer.
So that claims go stale within the run, a process counts as dead after two seconds here.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_fdd.host import rehearsal

rehearsal.start()

from benchmarks import replay  # noqa: E402
from megatron_fdd import distill  # noqa: E402
from megatron_fdd.data.stream import claims, sign  # noqa: E402
from megatron_fdd.data.stream.folder import replicas  # noqa: E402
from megatron_fdd.host import process  # noqa: E402

process.PATIENCE_S = 0.0  # there is no launcher
claims.STALE_S, claims._LOOK_S, sign.BEAT_S = 2.0, 0.5, 0.2
STEPS, PRODUCERS, WINDOW, TOKENS_PER_S = 18, 2, 400_000, 400
FLAGS = (
    f"--seq-length 16 --micro-batch-size 2 --global-batch-size 8 --train-iters {STEPS} --eval-interval 6 "
    "--eval-iters 1 --seed 7 --split 80,20,0 --tokenizer-type HuggingFaceTokenizer --fdd-layers 2"
).split()
TRAINING = (
    "--use-checkpoint-args --lr 3e-3 --hidden-dropout 0 --attention-dropout 0 --save-interval 4".split()
)
LAYOUTS = {2: "", 4: "--tensor-model-parallel-size 2 --sequence-parallel"}
LONGEST_S, QUIET_S, MOST_S = 2.0, 90.0, 600.0


def forked(run: Callable[[], int], log: Path) -> int:
    """Run a function in a process of its own, which this one's imports are ready in; return its number."""
    pid = os.fork()
    if pid:
        return pid
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    status = 99
    try:
        status = run()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    raise AssertionError


class Training:
    """A training, all of its processes."""

    def __init__(self, flags: Sequence[str], ranks: int, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        self.ends: dict[int, int | None] = {}
        for rank in range(ranks):
            where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}

            def run(where: dict[str, object] = where) -> int:
                os.environ.update(
                    {name: str(value) for name, value in where.items()}, MASTER_ADDR="localhost"
                )
                sys.argv[1:] = flags
                return distill.main()

            self.ends[forked(run, log)] = None

    def looked(self) -> list[int | None]:
        """Return the exit status of each process, -9 of one that was killed; None of those that run."""
        for pid, end in self.ends.items():
            if end is None:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    self.ends[pid] = os.waitstatus_to_exitcode(status)
        return list(self.ends.values())

    def kill(self, count: int, number: int = signal.SIGKILL) -> None:
        """Kill some of the processes."""
        for pid in [pid for pid, end in self.ends.items() if end is None][:count]:
            os.kill(pid, number)

    def end(self) -> None:
        """Kill what is left, and wait for it."""
        self.kill(len(self.ends))
        while None in self.looked():
            time.sleep(0.01)


def training_flags(toy: Path, store: Path, folder: Path, ranks: int, *more: str) -> list[str]:
    """Return the flags of a training that saves to `folder`, and goes on from there."""
    data = ("--data-path", toy / "text", "--tokenizer-model", toy / "teacher" / "tokenizer")
    places = ("--pretrained-checkpoint", toy / "student", "--save", folder, "--load", folder)
    own = ("--fdd-teacher-store", store, "--fdd-metrics-file", folder / "metrics.jsonl")
    return [*FLAGS, *TRAINING, *map(str, (*data, *places, *own)), *LAYOUTS[ranks].split(), *more]


def measured(folder: Path) -> list[dict[str, object]]:
    """Return the metrics of a training without what a clock measured."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    times = ("seconds", "data_seconds")
    return [{name: value for name, value in json.loads(line).items() if name not in times} for line in lines]


def producer(finished: Path, stream: Path, log: Path) -> Training:
    """Start a producer that replays the finished store."""
    made = Training([], 0, log)
    words = [str(finished), str(stream), "--window-bytes", str(WINDOW), "--tokens-per-s", str(TOKENS_PER_S)]

    def run() -> int:
        os.environ.pop("RANK", None)
        return replay.main([*words, "--batch-tokens", "64", "--idle-timeout", "60"])

    made.ends[forked(run, log)] = None
    return made


def kill_one_run(
    toy: Path, finished: Path, folder: Path, ranks: int, most: int, chance: random.Random
) -> Counter[str]:
    """Kill until a training is complete, at most so often; return what was counted."""
    counts: Counter[str] = Counter({"trainings": 1})
    stream, log = folder / "stream", folder / "log"
    flags = training_flags(
        toy, stream, folder / "run", ranks, "--fdd-teacher-follow", "--fdd-teacher-wait", "60"
    )
    folder.mkdir()
    producers = [producer(finished, stream, log) for _ in range(PRODUCERS)]
    training, begun_s, kills = Training(flags, ranks, log), time.monotonic(), 0
    while True:
        until_s = time.monotonic() + chance.uniform(0.0, LONGEST_S)
        while time.monotonic() < until_s and None in training.looked():
            time.sleep(0.02)
        if None not in training.looked():
            if set(training.looked()) == {0}:
                break
            counts["failed"] += 1
            training = Training(flags, ranks, log)
        if time.monotonic() - begun_s > MOST_S:
            counts["failed"] += 1
            break
        if kills >= most:
            continue
        kills += 1
        if chance.random() < 0.25:
            is_whole = chance.random() < 0.7
            training.kill(ranks if is_whole else 1)
            training.kill(ranks, signal.SIGTERM)  # as torchrun does when one has ended
            counts["kills of trainings" if is_whole else "kills of one process of a training"] += 1
            until_s = time.monotonic() + QUIET_S
            while None in training.looked() and time.monotonic() < until_s:
                time.sleep(0.02)
            counts["hung"] += None in training.looked()
            training.end()
            training = Training(flags, ranks, log)
        else:
            place = chance.randrange(PRODUCERS)
            producers[place].kill(1)
            producers[place].end()
            counts["kills of producers"] += 1
            producers[place] = producer(finished, stream, log)
    until_s = time.monotonic() + QUIET_S
    while any(None in each.looked() for each in producers) and time.monotonic() < until_s:
        time.sleep(0.02)
    counts["producers that did not end"] += sum(each.looked() != [0] for each in producers)
    for each in (*producers, training):
        each.end()
    wanted, found = measured(folder.parent / f"wanted-{ranks}"), measured(folder / "run")
    if len(found) == len(wanted) - 1:  # killed between the last checkpoint and the last validation
        wanted = wanted[:-1]
    counts["records compared"] += len(found)
    counts["differences"] += wanted != found
    counts["answers left"] += sum(len(each.listing().segments) for each in replicas(stream))
    return counts


def finish(toy: Path, folder: Path, ranks: Sequence[int]) -> Path:
    """Make the finished store, and train with it undisturbed."""
    finished = folder / "finished"
    own = ("--engine", "megatron", "--teacher", toy / "teacher", "--store", finished, "--form", "float32")
    data = ("--data-path", toy / "text", "--tokenizer-model", toy / "teacher" / "tokenizer")
    words = [sys.executable, "-c", "from megatron_fdd.cli import main; main()", "teach"]
    words += [*map(str, (*own, *data)), *FLAGS]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    for count in ranks:
        run = Training(
            training_flags(toy, finished, folder / f"wanted-{count}", count), count, folder / "log"
        )
        while None in run.looked():
            time.sleep(0.05)
        assert set(run.looked()) == {0}, (folder / "log").read_text()[-3000:]
    return finished


def main() -> int:
    """Kill and print; return the exit status, 1 after a difference."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--toy", type=Path, required=True, help="folder with small models and their text")
    parser.add_argument("--kills", type=int, default=200, help="(%(default)s)")
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[2, 4], help="processes of a training (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=1, help="(%(default)s)")
    args = parser.parse_args()
    chance, begun_s, number = random.Random(args.seed), time.monotonic(), 0
    total: Counter[str] = Counter()
    folder, toy = Path(tempfile.mkdtemp()), args.toy.absolute()
    try:
        finished = finish(toy, folder, args.ranks)
        while (kills := sum(count for name, count in total.items() if name.startswith("kills"))) < args.kills:
            ranks = args.ranks[number % len(args.ranks)]
            number += 1
            run = folder / f"run-{number}"
            counts = kill_one_run(toy, finished, run, ranks, min(25, args.kills - kills), chance)
            total += counts
            bad = [
                name
                for name in ("differences", "failed", "hung", "producers that did not end")
                if counts[name]
            ]
            print(f"{ranks} processes: {dict(counts)}, {time.monotonic() - begun_s:.0f} s", flush=True)
            if bad:
                print((run / "log").read_text()[-3000:])
            shutil.rmtree(run)
    finally:
        shutil.rmtree(folder)
    print(f"{dict(total)}, {time.monotonic() - begun_s:.0f} s")
    return int(any(total[name] for name in ("differences", "failed", "hung", "producers that did not end")))


if __name__ == "__main__":
    sys.exit(main())
