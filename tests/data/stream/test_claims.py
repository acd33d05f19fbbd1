"""Asks and claims: the order of the work, one owner each, and the takeover from the dead."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from megatron_fdd.data.stream.ask import Ask
from megatron_fdd.data.stream.claims import Claims
from megatron_fdd.data.stream.folder import (
    ReplicaFolder,
    left_path,
    producer_path,
    sweep_stream,
    window_bytes,
    write_window,
)
from megatron_fdd.data.stream.sign import STALE_S, Sign, changing, read_sign
from tests.data.store.made import unit
from tests.data.stream.made import WINDOW, Hand, answer, answer_all, batch, ids_of, stream

# A takeover may last so long.
GOAL_S = 90.0


def ask(folder: ReplicaFolder, number: int, place: int | None = None) -> Ask:
    made = Ask.of(number if place is None else place, ids_of(batch(number)))
    folder.write_ask(made.place, made.name, made.content())
    return made


def places(batches: list[list[object]]) -> list[list[int]]:
    return [[claimed.ask.place for claimed in each] for each in batches]  # type: ignore[attr-defined]


def test_an_ask_comes_back_as_it_was_and_a_damaged_one_is_none(tmp_path: Path) -> None:
    folder = stream(tmp_path)
    first, second = ids_of(batch(1))
    made = Ask.of(7, [first, second, first])
    assert len(made.units) == 2
    folder.write_ask(made.place, made.name, made.content())
    path = folder.ask(made.place, made.name)
    again = Ask.read(path, 7, made.name)
    assert again is not None
    assert (again.place, again.name) == (7, made.name)
    for ids, wanted in zip(again.units, made.units, strict=True):
        np.testing.assert_array_equal(ids, wanted)
    whole = path.read_bytes()
    for content in (b"", whole[:-4], whole[:-1], whole[:3], whole + b"1234", b"\xff" * 40, bytes(len(whole))):
        path.write_bytes(content)
        assert Ask.read(path, 7, made.name) is None, content[:8]
    path.unlink()
    assert Ask.read(path, 7, made.name) is None


def test_work_goes_in_the_students_order_and_fills_a_forward_pass(tmp_path: Path) -> None:
    folder, other = stream(tmp_path), ReplicaFolder(tmp_path, 1)
    for number in (3, 0, 2):
        ask(folder, number)
    ask(other, 1)
    tokens = Ask.of(0, ids_of(batch(0))).padded_tokens
    claims = Claims(tmp_path, "a")
    assert places(claims.take(1, 1)) == [[0]]
    assert places(claims.take(2 * tokens + 20, 1)) == [[1, 2]]  # of both replicas
    ask(folder, 4)
    assert places(claims.take(1, 3)) == [[3], [4]]
    assert claims.take(1, 1) == []


def test_an_ask_is_answered_by_one_producer(tmp_path: Path) -> None:
    folder = stream(tmp_path)
    for number in range(6):
        ask(folder, number)
    own, other = Claims(tmp_path, "a"), Claims(tmp_path, "b")
    taken = [*own.take(10**6, 1)[0][:1], *own.take(10**6, 1)]
    assert taken[1:] == []
    assert other.take(10**6, 1) == []
    taken[0].give_back()
    [[again]] = other.take(10**6, 1)
    assert again.ask.name == taken[0].ask.name
    answer(again)
    there = folder.listing()
    assert again.ask.name in there.segments
    assert again.ask.name not in there.asks.keys() | there.claims


def test_an_answer_of_a_producer_that_died_behind_it_counts(tmp_path: Path) -> None:
    folder = stream(tmp_path)
    made = ask(folder, 0)
    answer_all(Claims(tmp_path, "a"))
    folder.write_ask(made.place, made.name, made.content())  # it had not taken the ask away
    assert Claims(tmp_path, "b").take(1, 1) == []
    assert not folder.listing().asks
    assert not folder.listing().claims


@pytest.mark.parametrize(("has_sign", "written_s"), [(True, 0), (True, 1 << 33), (False, 0)])
def test_a_dead_producers_claim_is_taken_over_by_one(tmp_path: Path, has_sign: bool, written_s: int) -> None:
    """By the observer's own clock: what the sign or the files say of the time does not matter."""
    folder, clock = stream(tmp_path), Hand()
    ask(folder, 0)
    if has_sign:
        Sign(producer_path(tmp_path, "dead")).close()
    Claims(tmp_path, "dead").take(1, 1)
    for path in tmp_path.rglob("*.*"):
        os.utime(path, (written_s, written_s))
    first, second = Claims(tmp_path, "a", clock), Claims(tmp_path, "b", clock)
    while clock.now_s < STALE_S:
        assert first.take(1, 1) == second.take(1, 1) == []
        clock.now_s += 1.0
    while clock.now_s < GOAL_S:
        found = [*first.take(1, 1), *second.take(1, 1)]
        if found:
            break
        clock.now_s += 1.0
    assert len(found) == 1
    assert folder.claim(found[0][0].ask.name).read_text() == "a"
    assert not list(folder.path.glob(".*"))


def test_a_living_producers_claim_stays(tmp_path: Path) -> None:
    folder, clock = stream(tmp_path), Hand()
    ask(folder, 0)
    sign = Sign(producer_path(tmp_path, "slow"))
    Claims(tmp_path, "slow").take(1, 1)
    other = Claims(tmp_path, "b", clock)
    for _ in range(20):
        assert other.take(1, 1) == []
        clock.now_s += STALE_S / 4
        sign._write()
    sign.leave(left_path(tmp_path))
    assert not producer_path(tmp_path, "slow").exists()


def test_a_claim_that_was_begun_and_not_written_goes_stale_too(tmp_path: Path) -> None:
    folder, clock = stream(tmp_path), Hand()
    made = ask(folder, 0)
    folder.claim(made.name).touch()
    claims = Claims(tmp_path, "a", clock)
    assert claims.take(1, 1) == []
    clock.now_s = STALE_S + 6
    assert claims.take(1, 1) == []  # this look has found it
    assert len(claims.take(1, 1)) == 1
    assert folder.claim(made.name).read_text() == "a"


def test_what_is_gone_is_forgotten(tmp_path: Path) -> None:
    """A long training has millions of claims."""
    folder, clock = stream(tmp_path), Hand()
    own, other = Claims(tmp_path, "a", clock), Claims(tmp_path, "b", clock)
    for number in range(4):
        ask(folder, number)
        [[claimed]] = own.take(1, 1)
        clock.now_s += 6.0
        assert other.take(1, 1) == []  # and looks at the claim
        assert list(other._watch._seen) == [folder.claim(claimed.ask.name)]
        answer(claimed)


def test_what_killed_producers_left_goes_after_a_day(tmp_path: Path) -> None:
    folder = stream(tmp_path)
    made = ask(folder, 0)
    Sign(folder.student).close()
    Claims(tmp_path, "a").take(1, 1)
    kept = {path for path in tmp_path.rglob("*") if path.is_file()}
    aside = folder.claim(made.name).with_name(f".{made.name}.claim.killed")
    aside.touch()
    Sign(producer_path(tmp_path, "killed")).close()
    assert sweep_stream(tmp_path) == 0
    for path in tmp_path.rglob("*.*"):
        os.utime(path, (0, 0))
    Sign(producer_path(tmp_path, "alive")).close()
    assert sweep_stream(tmp_path) == 2
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == {
        *kept,
        producer_path(tmp_path, "alive"),
    }


def test_a_damaged_ask_is_taken_away(tmp_path: Path) -> None:
    """The student asks again."""
    folder = stream(tmp_path)
    made = ask(folder, 0)
    folder.ask(0, made.name).write_bytes(b"12345678")
    assert Claims(tmp_path, "a").take(1, 1) == []
    assert not folder.listing().asks


def test_a_stream_has_one_window(tmp_path: Path) -> None:
    assert window_bytes(tmp_path) is None
    stream(tmp_path)
    write_window(tmp_path, WINDOW)
    with pytest.raises(
        ValueError, match=rf"^--window-bytes 5: the stream in .* has a window of {WINDOW} bytes; give"
    ):
        write_window(tmp_path, 5)
    path = tmp_path / "stream" / "window.json"
    path.write_text('{"bytes": "many"}')
    with pytest.raises(ValueError, match=r"window.json: has no number of bytes; remove it"):
        window_bytes(tmp_path)


def test_what_is_no_file_of_a_stream_is_none(tmp_path: Path) -> None:
    folder = stream(tmp_path)
    made = ask(folder, 0)
    for name in ("notes.txt", f"{made.name}.asked", f"x.{made.name}.asked", ".hidden.claim", "a.safetensors"):
        (folder.path / name).touch()
    there = folder.listing()
    assert (there.asks, there.claims, there.segments) == ({made.name: 0}, set(), set())


def test_a_sign_changes_until_it_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_fdd.data.stream.sign.BEAT_S", 0.02)
    path = tmp_path / "here" / "student.json"
    assert changing([path]) is None
    sign = Sign(path, state="running")
    assert changing([tmp_path, path]) == path
    sign.close()
    assert changing([path]) is None
    assert read_sign(path)["state"] == "running"  # type: ignore[index]
    Sign(path, state="ended").close()
    path.write_text("{half")
    assert read_sign(path) is None


def test_more_than_one_unit_of_a_kind(tmp_path: Path) -> None:
    assert Ask.of(0, [unit(5)[0]] * 3).padded_tokens == 5
