"""A training that follows a stream learns, bit for bit, what it learns from the finished store."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from benchmarks.replay import ReplayEngine, begin
from megatron_fdd.data.store.store import Store
from megatron_fdd.data.stream.folder import replicas, window_bytes
from megatron_fdd.teach.follow import follow
from tests.entry.checks import assert_refused
from tests.entry.command import TIMES, read_metrics, run, trained
from tests.entry.conftest import Toys
from tests.entry.stored import stored_run, teach

WINDOW = 1 << 20
FOLLOW = ("--fdd-teacher-follow", "--fdd-teacher-wait", "60")
LAYOUTS = {
    "dp2": "",
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


def test_a_followed_stream_gives_what_the_finished_store_gives(toy: Toys, tmp_path: Path) -> None:
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
        assert [folder.replica for folder in replicas(stream)] == ([0, 1] if name == "dp2" else [0])
        assert not any(folder.listing().segments or folder.listing().asks for folder in replicas(stream))
    assert window_bytes(stream) == WINDOW


def test_what_cannot_be_followed_is_refused(toy: Toys, tmp_path: Path) -> None:
    finished, metrics, stream = tmp_path / "finished", tmp_path / "metrics.jsonl", tmp_path / "stream"
    trained(teach(toy, finished), ranks=1)
    begin(Store.open(finished, "finished"), stream, 30000)
    at = toy.command().index("--teacher-load")
    live = toy.command("--fdd-teacher-follow")
    no_stream, too_long, small, alone, nobody = run(
        stored_run(toy, finished, metrics, *FOLLOW),
        stored_run(toy, stream, metrics, "--fdd-teacher-follow", "--fdd-teacher-wait", "600"),
        stored_run(toy, stream, metrics, *FOLLOW),
        [*live[:at], *live[at + 2 :], "--fdd-alpha", "0"],
        stored_run(toy, tmp_path / "none", metrics, "--fdd-teacher-follow", "--fdd-teacher-wait", "0.2"),
    )
    assert_refused(
        no_stream, "finished is no stream; leave it out, or make the store with fdd teach --follow"
    )
    assert_refused(too_long, "--fdd-teacher-wait 600: ranks that wait for each other give up after")
    assert_refused(
        small, r"its window of 30000 bytes is too small: 2 data-parallel replica\(s\) with 2 data set\(s\)"
    )
    assert_refused(alone, "--fdd-teacher-follow: says how --fdd-teacher-store is read; give the folder")
    assert_refused(nobody, r"no producer has begun this stream in 0.2 s \(no lens/lens.safetensors\)")
