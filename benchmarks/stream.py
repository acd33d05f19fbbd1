"""Does a stream keep its word? A training follows producers that replay a finished store at a set rate.

    python -m benchmarks.stream --toy TOY  # the figures are in benchmarks/LOG.md

Measured are: the part of a step that waits for data, with producers that are faster than the student; the student's
speed, with producers that are slower, against theirs; the most bytes that the stream's files took at any look; and how
long a killed producer's claim kept others waiting. TOY: see `tests/hostile/stream_kills.py`. Each training is a process
of its own; with two cores the producers take part of the student's.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_fdd.data.store.store import Store
from megatron_fdd.data.stream.claims import owner_of
from megatron_fdd.data.stream.folder import ReplicaFolder, producers

FDD = [sys.executable, "-c", "from megatron_fdd.cli import main; main()"]
LENGTH, ROWS = 64, 8
# Micro-batches of the window, and steps after which what was made before the first one is used up.
WINDOW, WARM_UP = 12, 15
GOAL_WAIT, GOAL_RATE, GOAL_TAKEOVER_S = 0.01, 0.05, 90.0


def data_flags(toy: Path, steps: int) -> list[str]:
    """Return the flags of the data, for producers and trainings alike."""
    text = (
        f"--seq-length {LENGTH} --micro-batch-size {ROWS} --global-batch-size {ROWS} --train-iters {steps} "
        f"--eval-interval 100000 --eval-iters 0 --seed 7 --split 100,0,0 --data-path {toy / 'text'} --fdd-layers 2 "
        f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {toy / 'teacher' / 'tokenizer'}"
    )
    return text.split()


def train(toy: Path, store: Path, steps: int, metrics: Path, *more: str) -> list[str]:
    """Return the command of a training."""
    own = (
        "--fdd-teacher-store",
        store,
        "--fdd-metrics-file",
        metrics,
        "--pretrained-checkpoint",
        toy / "student",
    )
    flags = (
        "--use-checkpoint-args --lr 1e-3 --hidden-dropout 0 --attention-dropout 0 --log-interval 1".split()
    )
    return [*FDD, "train", "--", *data_flags(toy, steps), *map(str, own), *flags, *more]


class Watcher(threading.Thread):
    """What the files of answers take, and when steps end, looked at again and again.

    Attributes:
        most: bytes.
        ended_s: when the n-th step had written its metrics.
    """

    def __init__(self, stream: Path, metrics: Path) -> None:
        super().__init__(daemon=True)
        self.stream, self.metrics, self.most = stream, metrics, 0
        self.ended_s: dict[int, float] = {}
        self.start()

    def run(self) -> None:
        """Look until the process ends."""
        while True:
            size = 0
            for path in (self.stream / "stream").glob("0/*safetensors*"):
                try:
                    size += path.stat().st_size
                except FileNotFoundError:
                    continue
            self.most = max(self.most, size)
            if self.metrics.exists():
                self.ended_s.setdefault(self.metrics.read_bytes().count(b"\n"), time.monotonic())
            time.sleep(0.01)


def started_producer(
    finished: Path, stream: Path, window: int, rate: float | None
) -> subprocess.Popen[bytes]:
    """Start a producer that replays the finished store."""
    words = [str(finished), str(stream), "--window-bytes", str(window), "--batch-tokens", str(ROWS * LENGTH)]
    words += [] if rate is None else ["--tokens-per-s", str(rate)]
    return subprocess.Popen([sys.executable, "-m", "benchmarks.replay", *words], stdout=subprocess.DEVNULL)


def measure(
    toy: Path, finished: Path, folder: Path, *, steps: int, rates: Sequence[float | None], window: int
) -> dict[str, Any]:
    """Let a training follow producers of these rates; return figures."""
    stream, metrics = folder / "stream", folder / "metrics.jsonl"
    folder.mkdir()
    running = [started_producer(finished, stream, window, rate) for rate in rates]
    while len(producers(stream)) < len(rates):
        time.sleep(0.1)
    watcher = Watcher(stream, metrics)
    command = train(toy, stream, steps, metrics, "--fdd-teacher-follow")
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    for each in running:
        assert each.wait(60) == 0
    records = [json.loads(line) for line in metrics.read_text().splitlines()][WARM_UP:]
    seconds = [record["seconds"] for record in records]
    waits = [record["data_seconds"] for record in records]
    first, last = (pick(each for each in watcher.ended_s if each >= WARM_UP) for pick in (min, max))
    return {
        "step, median s": statistics.median(seconds),
        "wait, part of a step": sum(waits) / sum(seconds),
        "wait, median part": statistics.median(
            wait / all_ for wait, all_ in zip(waits, seconds, strict=True)
        ),
        "tokens/s": (last - first) * ROWS * LENGTH / (watcher.ended_s[last] - watcher.ended_s[first]),
        "window": window,
        "most bytes": watcher.most,
    }


def measure_takeover(toy: Path, finished: Path, folder: Path, *, steps: int, window: int) -> float:
    """Kill a producer that holds a claim; return the seconds until another producer has answered it."""
    stream = folder / "stream"
    folder.mkdir()
    dead = started_producer(finished, stream, window, 20.0)  # a micro-batch takes it half a minute
    training = subprocess.Popen(
        train(toy, stream, steps, folder / "m.jsonl", "--fdd-teacher-follow"), stdout=subprocess.DEVNULL
    )
    replica = ReplicaFolder(stream, 0)
    while not (claimed := replica.listing().claims):
        time.sleep(0.1)
    [name] = claimed
    assert owner_of(replica.claim(name)) in producers(stream)
    other = started_producer(finished, stream, window, None)
    while len(producers(stream)) < 2:
        time.sleep(0.1)
    os.kill(dead.pid, signal.SIGKILL)
    dead.wait()
    killed_s = time.monotonic()
    while name in replica.listing().claims or not (training.poll() is not None or _is_past(replica, name)):
        time.sleep(0.05)
    seconds = time.monotonic() - killed_s
    assert training.wait(300) == 0
    assert other.wait(60) == 0
    return seconds


def _is_past(replica: ReplicaFolder, name: str) -> bool:
    """Whether an ask has been answered, and perhaps used."""
    there = replica.listing()
    return name in there.segments or name not in there.asks


def main() -> int:
    """Measure and print; return the exit status, 1 if a goal is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--toy", type=Path, required=True, help="folder with small models and their text")
    parser.add_argument("--steps", type=int, default=120, help="of a training (%(default)s)")
    args = parser.parse_args()
    toy, folder = args.toy.absolute(), Path(tempfile.mkdtemp())
    finished = folder / "finished"
    teach = [
        "teach",
        "--engine",
        "megatron",
        "--teacher",
        toy / "teacher",
        "--store",
        finished,
        "--form",
        "float32",
    ]
    command = [*FDD, *map(str, teach), *data_flags(toy, args.steps)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    identity = Store.open(finished, "finished").identity
    segment = ROWS * LENGTH * identity.token_bytes * len(identity.blocks)
    window = WINDOW * segment
    found: dict[str, Any] = {"a micro-batch's bytes": segment}
    fast = found["fast"] = measure(
        toy, finished, folder / "fast", steps=args.steps, rates=[None, None], window=window
    )
    print(json.dumps(fast), flush=True)
    rate = fast["tokens/s"] / 4
    found["slow"] = slow = measure(
        toy, finished, folder / "slow", steps=args.steps, rates=[rate * 0.75, rate * 0.25], window=window
    )
    slow["producers' tokens/s"] = rate
    print(json.dumps(slow), flush=True)
    found["takeover, s"] = measure_takeover(
        toy, finished, folder / "takeover", steps=args.steps, window=window
    )
    goals = {
        "fast enough: wait below 1 % of a step": fast["wait, part of a step"] < GOAL_WAIT,
        "too slow: within 5 % of the producers": abs(slow["tokens/s"] / rate - 1) <= GOAL_RATE,
        "window": all(found[name]["most bytes"] <= window + 2 * segment for name in ("fast", "slow")),
        "takeover": found["takeover, s"] < GOAL_TAKEOVER_S,
    }
    print(json.dumps({**found, "goals": goals}, indent=1))
    return int(not all(goals.values()))


if __name__ == "__main__":
    sys.exit(main())
