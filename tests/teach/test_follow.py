"""A stream's producer, in one process and with made-up engines: rounds, failures, and when it ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from megatron_fdd.data.store.identity import StoreIdentity
from megatron_fdd.data.store.segment import Bytes, write_segment
from megatron_fdd.data.store.store import Ids
from megatron_fdd.data.stream.ask import Ask
from megatron_fdd.data.stream.claims import Claimed
from megatron_fdd.data.stream.folder import ReplicaFolder, left_path, producers
from megatron_fdd.data.stream.sign import Sign, read_sign
from megatron_fdd.teach import follow as follow_module
from megatron_fdd.teach.follow import _run, check_window, follow
from megatron_fdd.teach.following import Following
from megatron_fdd.teach.request import parse
from tests.data.store.made import IDENTITY
from tests.data.stream.made import LONGEST_S, assert_reads, batch, ids_of, reader, states_of, stream, until

OWN = "--engine megatron --teacher T --store S".split()


class Engine:
    """An engine that knows the units of `tests.data.stream.made`, and notes what it runs."""

    identity: StoreIdentity = IDENTITY

    def __init__(self, replica: int = 0, num_replicas: int = 1, *, writes: bool = True) -> None:
        self.replica, self.num_replicas, self.writes = replica, num_replicas, writes
        self.ran: list[list[int]] = []

    def lens(self, units: Sequence[Ids]) -> None:
        return None

    def states(self, units: Sequence[Ids]) -> list[Bytes]:
        self.ran.append([len(ids) for ids in units])
        return [states_of(ids)[1] for ids in units] if self.writes else []


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow_module.dist, "broadcast_object_list", lambda told, src: None)
    monkeypatch.setattr(follow_module, "_PAUSE_S", 0.01)
    monkeypatch.setattr("megatron_fdd.data.stream.sign.BEAT_S", 0.02)


@contextmanager
def following(engine: Any, store: Path, idle_s: float = 20.0) -> Iterator[list[BaseException]]:
    """Run a producer in a thread; in the end, what it raised is in the list."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            follow(engine, store, 16384, idle_s)
        except ValueError as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    yield raised
    thread.join(20)
    assert not thread.is_alive()


def ask(folder: ReplicaFolder, number: int) -> None:
    made = Ask.of(number, ids_of(batch(number)))
    folder.write_ask(made.place, made.name, made.content())


def test_it_answers_until_the_training_has_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = stream(tmp_path)
    sign = Sign(folder.student, state="running")
    for number in range(3):
        ask(folder, number)
    with following(Engine(), tmp_path) as raised:
        for number in range(3):
            assert_reads(reader(folder), batch(number))
        until(lambda: not folder.listing().claims)
        until(lambda: [found["answered"] for found in producers(tmp_path).values()] == [3])
        sign.close(state="ended")
    assert raised == []
    assert folder.listing().asks == producers(tmp_path) == {}
    assert "the training has ended; this producer ends\n" in capsys.readouterr().out


def test_it_waits_for_a_training_that_ended_before_it_began(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow_module, "_SAID_S", 0.05)
    folder = stream(tmp_path)
    Sign(folder.student, state="ended").close()
    with following(Engine(), tmp_path, idle_s=0.3):
        pass
    out = capsys.readouterr().out
    assert (
        "waiting: no training follows (0 micro-batches answered)\n" in out
        or "waiting: the training has all" in out
    )
    assert "no training has given a sign of life for 0.3 s; this producer ends\n" in out


def test_a_training_that_died_is_waited_for(tmp_path: Path) -> None:
    folder = stream(tmp_path)
    Sign(folder.student, state="running").close()
    with following(Engine(), tmp_path):
        again = Sign(folder.student, state="running")
        ask(folder, 5)
        assert_reads(reader(folder), batch(5))
        again.close(state="ended")


def test_a_full_disk_gives_the_claims_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise ValueError(
            "--store S: cannot be written: No space left on device (0 MiB free there); make room there"
        )

    folder = stream(tmp_path)
    ask(folder, 0)
    monkeypatch.setattr(follow_module, "write_segment", full)
    with following(Engine(), tmp_path) as raised:
        pass
    assert "No space left on device" in str(raised[0])
    assert folder.listing().claims == set()
    assert len(folder.listing().asks) == 1
    assert producers(tmp_path) == {}
    left = read_sign(left_path(tmp_path))
    assert left is not None
    assert (
        left["answered"] == 0
    )  # else a training would wait for ever while one producer after the other fails so


def test_an_answer_is_counted_when_it_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_write = threading.Event()

    def slow(*given: Any) -> None:
        may_write.wait(LONGEST_S)
        write_segment(*given)

    folder = stream(tmp_path)
    sign = Sign(folder.student, state="running")
    ask(folder, 0)
    monkeypatch.setattr(follow_module, "write_segment", slow)
    engine = Engine()
    with following(engine, tmp_path):
        until(lambda: bool(engine.ran))
        beats = {name: found["beat"] for name, found in producers(tmp_path).items()}
        until(lambda: all(found["beat"] > beats[name] + 5 for name, found in producers(tmp_path).items()))
        assert [found["answered"] for found in producers(tmp_path).values()] == [0]
        may_write.set()
        until(lambda: [found["answered"] for found in producers(tmp_path).values()] == [1])
        sign.close(state="ended")


def test_a_training_that_was_stopped_is_waited_for(tmp_path: Path) -> None:
    """By an error, or by --exit-interval: it may come back, as one that was killed."""
    folder = stream(tmp_path)
    sign = Sign(folder.student, state="running")
    with following(Engine(), tmp_path):
        ask(folder, 0)
        assert_reads(reader(folder), batch(0))
        sign.close(state="stopped")
        ask(folder, 1)
        assert_reads(reader(folder), batch(1))
        Sign(folder.student, state="ended").close()


def test_an_engine_that_fails_gives_the_claims_back(tmp_path: Path) -> None:
    class Failing(Engine):
        def states(self, units: Sequence[Ids]) -> list[Bytes]:
            raise ValueError("block 2: a hidden state is not finite")

    folder = stream(tmp_path)
    ask(folder, 0)
    with following(Failing(), tmp_path) as raised:
        pass
    assert str(raised[0]) == "block 2: a hidden state is not finite"
    assert folder.listing().claims == set()


def test_what_nobody_asks_for_any_more_is_dropped(tmp_path: Path) -> None:
    """The student has ended, or started again with other batches, while the engine ran."""
    folder = stream(tmp_path)
    gone, moved = (Ask.of(number, ids_of(batch(number))) for number in range(2))

    class Slow(Engine):
        def states(self, units: Sequence[Ids]) -> list[Bytes]:
            folder.clear()
            folder.write_ask(7, moved.name, moved.content())
            return super().states(units)

    sign = Sign(folder.student, state="running")
    for made in (gone, moved):
        folder.write_ask(made.place, made.name, made.content())
    with following(Slow(), tmp_path) as raised:
        until(lambda: folder.listing().segments != set())
        until(lambda: folder.listing().asks == {})
        sign.close(state="ended")
    assert raised == []
    assert folder.listing().segments == {moved.name}
    assert folder.listing().claims == set()


def work_of(folder: ReplicaFolder, *numbers: Sequence[int]) -> list[list[Claimed]]:
    return [[Claimed(folder, Ask.of(each, ids_of(batch(each)))) for each in own] for own in numbers]


def test_replicas_run_equally_many_batches(tmp_path: Path) -> None:
    work = work_of(ReplicaFolder(tmp_path, 0), [0, 1, 2], [3])
    engines = [Engine(number, 3) for number in range(3)]
    found = [_run(engine, work, 70) for engine in engines]
    assert len({len(engine.ran) for engine in engines}) == 1
    assert [len(states) for states in found] == [3, 1, 0]
    for states, own in zip(found, work, strict=False):
        for answer, claimed in zip(states, own, strict=True):
            for got, ids in zip(answer, claimed.ask.units, strict=True):
                assert got.tobytes() == states_of(ids)[1].tobytes()
    assert _run(Engine(0, 1, writes=False), work, 70) == [[], [], []]


def test_a_window_smaller_than_an_answer_is_refused() -> None:
    check_window(Following(200_000, 1.0), IDENTITY, 2048)
    with pytest.raises(
        ValueError, match=r"^--window-bytes 1000: the features of one sample of 2048 tokens take \d+ by"
    ):
        check_window(Following(1000, 1.0), IDENTITY, 2048)


@pytest.mark.parametrize(("text", "size"), [("200GiB", 200 << 30), ("500MB", 5 * 10**8), ("12345", 12345)])
def test_sizes(text: str, size: int) -> None:
    made = parse([*OWN, "--follow", "--window-bytes", text])
    assert made.follow == Following(size, 600.0)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--follow", "^--follow: give --window-bytes"),
        ("--window-bytes 5", "^--window-bytes 5: is for a stream; give --follow too"),
        ("--idle-timeout 5", "^--idle-timeout 5.0: is for a stream"),
        ("--follow --window-bytes 5G", "'5G' is no size such as 200GiB"),
        ("--follow --window-bytes 0", "'0' is no size"),
        ("--follow --window-bytes 5 --part 1/2", "^--part 1/2: leave it out"),
        ("--follow --window-bytes 5 --dry-run", "^--dry-run: with --follow nothing is known"),
        ("--follow --window-bytes 5 --idle-timeout nan", "^--idle-timeout nan: must be above 0"),
    ],
)
def test_flags_that_do_not_go_together(flags: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        parse([*OWN, *flags.split()])
