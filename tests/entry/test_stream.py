"""A training that follows a stream learns, bit for bit, what it learns from the finished store."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest

from benchmarks.replay import ReplayEngine, begin
from megatron_fdd.data.store.store import Store
from megatron_fdd.data.stream.describe import describe_stream
from megatron_fdd.data.stream.folder import replicas, window_bytes
from megatron_fdd.data.stream.sign import read_sign
from megatron_fdd.teach.follow import follow
from tests.entry.checks import assert_refused
from tests.entry.command import TIMES, read_metrics, run, teach_by_transformers, trained
from tests.entry.conftest import Toys
from tests.entry.stored import stored_run, teach

WINDOW = 1 << 20
FOLLOW = ("--fdd-teacher-follow", "--fdd-teacher-wait", "60")
LAYOUTS = {
    "tp2": "--tensor-model-parallel-size 2",
    "pp2": "--pipeline-model-parallel-size 2 --fdd-tokens all",
    "cp2": "--context-parallel-size 2 --num-workers 2",
}
EVALUATED = "--eval-interval 2 --eval-iters 1".split()


def nothing(_told: list[object], src: int) -> None:
    """Broadcast to nobody."""


@contextmanager
def producer(finished: Path, stream: Path, *, window: int = WINDOW) -> Iterator[threading.Thread]:
    """Let a thread replay a finished store, until the training has ended."""
    store = Store.open(finished, "finished")
    begin(store, stream, window)
    with patch("megatron_fdd.teach.follow.dist.broadcast_object_list", nothing):
        thread = threading.Thread(target=follow, args=(ReplayEngine(store), stream, 64, 60.0))
        thread.start()
        yield thread
        thread.join(60)
        assert not thread.is_alive()


def assert_same_bits(metrics: Path, wanted: Path) -> None:
    found = [
        {name: value for name, value in record.items() if name not in TIMES}
        for record in read_metrics(metrics)
    ]
    assert found == [
        {name: value for name, value in record.items() if name not in TIMES}
        for record in read_metrics(wanted)
    ]
    assert len(found) > 3


def test_a_training_that_stops_goes_on_as_with_the_finished_store(toy: Toys, tmp_path: Path) -> None:
    """The producer waits for it; both replicas ask for themselves."""
    finished, stream, wanted, metrics = (
        tmp_path / name for name in ("finished", "stream", "w.jsonl", "m.jsonl")
    )
    trained(teach(toy, finished, *EVALUATED), stored_run(toy, finished, wanted, *EVALUATED))
    saved = ("--save", tmp_path / "run", "--save-interval", 1, *EVALUATED, *FOLLOW)
    with producer(finished, stream) as thread:
        trained(stored_run(toy, stream, metrics, *saved, "--exit-interval", 2))
        assert thread.is_alive()
        assert [read_sign(folder.student)["state"] for folder in replicas(stream)] == ["stopped"] * 2
        assert any(folder.listing().segments for folder in replicas(stream))
        info = "\n".join(describe_stream(stream))
        trained(stored_run(toy, stream, metrics, *saved, "--load", tmp_path / "run"))
    assert_same_bits(metrics, wanted)
    assert not any(folder.listing().segments or folder.listing().asks for folder in replicas(stream))
    assert window_bytes(stream) == WINDOW
    assert re.search(r"^  stream: [\d.]+ kB of a window of 1.05 MB$", info, re.MULTILINE)
    assert re.search(
        r"^    replica 1: \d+ micro-batches are there, .*; stopped, last sign of life", info, re.MULTILINE
    )
    assert re.search(
        r"^    producer .*: \d+ micro-batches answered, 0 claimed, last sign", info, re.MULTILINE
    )


@pytest.mark.tier("all")
def test_a_stream_gives_what_the_finished_store_gives_at_other_layouts(toy: Toys, tmp_path: Path) -> None:
    finished = tmp_path / "finished"
    flags = {name: [*EVALUATED, *text.split()] for name, text in LAYOUTS.items()}
    trained(
        teach(toy, finished, *EVALUATED),
        *[stored_run(toy, finished, tmp_path / f"{name}.jsonl", *more) for name, more in flags.items()],
    )
    for name, more in flags.items():
        stream, metrics = tmp_path / f"stream-{name}", tmp_path / f"followed-{name}.jsonl"
        with producer(finished, stream):
            trained(stored_run(toy, stream, metrics, *more, *FOLLOW))
        assert_same_bits(metrics, tmp_path / f"{name}.jsonl")
        assert [folder.replica for folder in replicas(stream)] == [0]


@pytest.mark.tier("all")
def test_a_teacher_of_transformers_follows(toy: Toys, tmp_path: Path) -> None:
    """What it answers is what it would have stored; it begins before the training, and ends with it."""
    finished, stream, wanted, metrics = (
        tmp_path / name for name in ("finished", "stream", "w.jsonl", "m.jsonl")
    )
    own = ["--teacher", toy.root / "teacher-hf", "--form", "float32", "--device-map", "cpu"]
    data = toy.command(*EVALUATED)
    assert teach_by_transformers(*own, "--store", finished, *data).returncode == 0
    following = ("--follow", "--window-bytes", "1MiB", "--idle-timeout", 100)
    with ThreadPoolExecutor(1) as pool:
        taught = pool.submit(teach_by_transformers, *own, "--store", stream, *following, *data)
        trained(
            stored_run(toy, finished, wanted, *EVALUATED),
            stored_run(toy, stream, metrics, *EVALUATED, *FOLLOW),
        )
        ended = taught.result()
    assert ended.returncode == 0, ended.stderr
    assert "the training has ended; this producer ends" in ended.stdout
    for record, other in zip(read_metrics(metrics), read_metrics(wanted), strict=True):
        for name, value in other.items():
            assert name in TIMES or record[name] == pytest.approx(value, rel=2e-6), name
    assert len(Store.open(stream, "stream").index) == 0


def test_what_cannot_be_followed_is_refused(toy: Toys, tmp_path: Path) -> None:
    finished, metrics, stream = tmp_path / "finished", tmp_path / "metrics.jsonl", tmp_path / "stream"
    trained(teach(toy, finished), ranks=1)
    begin(Store.open(finished, "finished"), stream, 30000)
    no_stream, too_long, small, alone, nobody = run(
        stored_run(toy, finished, metrics, *FOLLOW),
        stored_run(toy, stream, metrics, "--fdd-teacher-follow", "--fdd-teacher-wait", "601"),
        stored_run(toy, stream, metrics, *FOLLOW),
        toy.command("--fdd-teacher-follow"),
        stored_run(toy, tmp_path / "none", metrics, "--fdd-teacher-follow", "--fdd-teacher-wait", "0.2"),
    )
    assert_refused(
        no_stream, "finished is no stream; leave it out, or make the store with fdd teach --follow"
    )
    assert_refused(too_long, "--fdd-teacher-wait 601: ranks that wait for each other give up after")
    assert_refused(
        small, r"its window of 30000 bytes is too small: 2 data-parallel replica\(s\) with 2 data set\(s\)"
    )
    assert_refused(alone, "--fdd-teacher-follow: says how --fdd-teacher-store is read; give the folder")
    assert_refused(nobody, r"no producer has begun this stream in 0.2 s \(no lens/lens.safetensors\)")
