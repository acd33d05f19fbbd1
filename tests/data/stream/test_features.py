"""What a rank reads of a stream: it waits, is told why nothing comes, and asks again for what is damaged."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from megatron_fdd.data.store.segment import write_segment
from megatron_fdd.data.stream.ask import Ask
from megatron_fdd.data.stream.features import StreamFeatures
from megatron_fdd.data.stream.folder import ReplicaFolder, left_path, producer_path
from megatron_fdd.data.stream.sign import Sign
from tests.data.store.made import IDENTITY, OTHER, T, flip
from tests.data.stream.made import Hand, assert_reads, batch, ids_of, reader, stream, wanted


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_fdd.data.stream.features._LONGEST_PAUSE_S", 0.001)


def put(folder: ReplicaFolder, number: int, digest: str = IDENTITY.digest) -> Path:
    units = {ids.tobytes(): (ids, states) for ids, states in batch(number)}
    name = Ask.of(0, ids_of(batch(number))).name
    write_segment(folder.store, folder.segment(name), digest, list(units.values()))
    return folder.segment(name)


def test_an_answer_is_read_when_it_is_there(tmp_path: Path) -> None:
    folder = stream(tmp_path)
    features = reader(folder)
    put(folder, 0)
    assert_reads(features, batch(0))
    thread = threading.Timer(0.1, put, (folder, 1))
    thread.start()
    assert_reads(features, batch(1))
    thread.join()


def test_units_that_come_again_and_units_of_other_ranks(tmp_path: Path) -> None:
    """The file's name is of all units of the micro-batch, whatever a rank needs of them."""
    folder = stream(tmp_path)
    put(folder, 0)
    first, second = batch(0)
    assert_reads(reader(folder), [first, second, first])
    [one, other], places = wanted([first, second])
    reader(folder).read_into(range(T), [one._replace(pieces=[]), other])
    assert b"".join(places[T:]) == second[1].tobytes()
    assert not any(map(any, places[:T]))
    reader(folder).read_into(range(T), [one._replace(pieces=[]), other._replace(pieces=[])])


def fail(features: StreamFeatures, number: int = 0) -> str:
    with pytest.raises(ValueError, match=".") as caught:
        assert_reads(features, batch(number))
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Quick(Hand):
    """A clock that goes on by itself."""

    def __call__(self) -> float:
        self.now_s += 0.5
        return self.now_s


def test_a_wait_without_producers_ends_with_what_is_waited_for(tmp_path: Path) -> None:
    folder = stream(tmp_path)
    ids = batch(0)[0][0]
    message = fail(StreamFeatures(folder, IDENTITY, 6.0, Quick()))
    assert f"--fdd-teacher-store {tmp_path}: nobody has answered anything for 6 s; 2 unit(s)" in message
    assert f"the first of {len(ids)} tokens, {ids[:6].tolist()}" in message
    assert "no producer has a sign of life there. Start" in message


def test_a_wait_tells_which_producer_left_last(tmp_path: Path) -> None:
    folder = stream(tmp_path)
    for name, count in (("host-1", 3), ("host-2", 5)):
        Sign(producer_path(tmp_path, name), name=name, answered=count).leave(left_path(tmp_path))
    message = fail(StreamFeatures(folder, IDENTITY, 6.0, Quick()))
    assert "there; the last one to leave was host-2, 0 s ago, 5 answered. Start" in message


def test_a_wait_tells_the_producers_last_sign_of_life(tmp_path: Path) -> None:
    folder = stream(tmp_path)
    Sign(producer_path(tmp_path, "host-1"), answered=3).close()
    assert "; host-1 gave no sign of life in that time." in fail(
        StreamFeatures(folder, IDENTITY, 6.0, Quick())
    )
    sign = Sign(producer_path(tmp_path, "host-2"), answered=3)

    class Beating(Quick):
        def __call__(self) -> float:
            sign._write()
            return super().__call__()

    message = fail(StreamFeatures(folder, IDENTITY, 6.0, Beating()))
    sign.close()
    assert "the last sign of life is of host-2, 0 s ago" in message


def test_a_wait_goes_on_as_long_as_anything_is_answered(tmp_path: Path) -> None:
    folder = stream(tmp_path)
    sign = Sign(producer_path(tmp_path, "slow"), answered=0)
    calls = 0

    class Answering(Quick):
        def __call__(self) -> float:
            nonlocal calls
            calls += 1
            sign.tell(answered=calls // 8)
            sign._write()
            if calls == 100:  # long after the six seconds
                put(folder, 0)
            return super().__call__()

    assert_reads(StreamFeatures(folder, IDENTITY, 6.0, Answering()), batch(0))
    sign.close()
    assert calls >= 100


def test_producers_that_come_and_go_are_no_answer(tmp_path: Path) -> None:
    """One that crashes in a loop has another name each time."""
    folder = stream(tmp_path)
    Sign(producer_path(tmp_path, "idle"), answered=7).close()

    class Crashing(Quick):
        def __call__(self) -> float:
            Sign(producer_path(tmp_path, f"host-{self.now_s}"), answered=0).close()
            producer_path(tmp_path, f"host-{self.now_s - 3}").unlink(missing_ok=True)
            if self.now_s == 4.0:  # it ends, and its answers with it
                producer_path(tmp_path, "idle").unlink()
            assert self.now_s < 30.0, "the wait has no end"
            return super().__call__()

    assert "nobody has answered anything for 6 s" in fail(StreamFeatures(folder, IDENTITY, 6.0, Crashing()))


def test_a_failure_of_the_students_first_rank_ends_all_waits(tmp_path: Path) -> None:
    folder = stream(tmp_path)
    Sign(folder.student, state="running", failure="asking has failed: no room").close()
    assert fail(StreamFeatures(folder, IDENTITY, 600.0, Quick())) == "asking has failed: no room"


def test_no_wait_outlives_the_run(tmp_path: Path) -> None:
    features = reader(stream(tmp_path))
    threading.Timer(0.05, features.end).start()
    with pytest.raises(RuntimeError, match="^the run has ended$"):
        assert_reads(features, batch(0))


def test_damage_is_asked_for_again_once(tmp_path: Path) -> None:
    folder = stream(tmp_path)
    path = put(folder, 0)
    flip(path, -1)

    def again() -> None:
        while path.exists():
            pass
        put(folder, 0)

    thread = threading.Thread(target=again)
    thread.start()
    assert_reads(reader(folder), batch(0))
    thread.join()
    flip(path, -1)

    def damaged() -> None:
        while path.exists():
            pass
        hidden = ReplicaFolder(tmp_path / "elsewhere", 0)
        flip(put(hidden, 0), -1)
        hidden.segment(path.stem).replace(path)

    thread = threading.Thread(target=damaged)
    thread.start()
    message = fail(reader(folder))
    thread.join()
    assert f"two answers in a row were damaged ({path}: has other bytes than were written" in message
    assert "remove-damaged" not in message


def test_an_answer_that_came_meanwhile_is_not_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another rank has found the damage too, and was quicker."""
    folder = stream(tmp_path)
    path = put(folder, 0)
    flip(path, -1)
    features, original = reader(folder), StreamFeatures._segment

    def slow(self: StreamFeatures, at: Path) -> object:
        opened = original(self, at)
        monkeypatch.setattr(StreamFeatures, "_segment", original)
        opened._file(0)
        path.unlink()
        put(folder, 0)
        return opened

    monkeypatch.setattr(StreamFeatures, "_segment", slow)
    assert_reads(features, batch(0))
    assert path.exists()


@pytest.mark.parametrize("size", [0, 100, -1])
def test_a_file_that_was_cut_off_is_damage(tmp_path: Path, size: int) -> None:
    folder = stream(tmp_path)
    path = put(folder, 0)
    path.write_bytes(path.read_bytes()[:size])

    def again() -> None:
        while path.exists():
            pass
        put(folder, 0)

    thread = threading.Thread(target=again)
    thread.start()
    assert_reads(reader(folder), batch(0))
    thread.join()


def test_an_answer_of_another_store_is_refused(tmp_path: Path) -> None:
    folder = stream(tmp_path)
    path = put(folder, 0, OTHER.digest)
    assert "is of the store" in fail(reader(folder))
    assert path.exists()
