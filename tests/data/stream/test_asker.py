"""The asker: how far it asks ahead, what it keeps and removes, and what it does with what others left."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_fdd.data.stream import asker as asker_module
from megatron_fdd.data.stream.ask import Ask
from megatron_fdd.data.stream.asker import Asker, bytes_of, check_alone
from megatron_fdd.data.stream.claims import Claims
from megatron_fdd.data.stream.folder import ReplicaFolder
from megatron_fdd.data.stream.sign import Sign, read_sign
from tests.data.store.made import IDENTITY, flip, unit
from tests.data.stream.made import (
    answer,
    answer_all,
    assert_reads,
    batch,
    ids_of,
    reader,
    stream,
    until,
)

LARGEST = max(bytes_of(IDENTITY, [len(ids) for ids, _ in batch(number)]) for number in range(100))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asker_module, "_LOOK_S", 0.02)
    monkeypatch.setattr("megatron_fdd.data.stream.sign.BEAT_S", 0.02)


class Training:
    """A training that takes batches and ends steps; `room` in micro-batches."""

    def __init__(
        self, folder: ReplicaFolder, numbers: Sequence[int], room: float, *, keeps: bool = False
    ) -> None:
        self.folder, self.claims = folder, Claims(folder.store, "producer")
        self.asker = Asker(folder, IDENTITY, int(room * LARGEST), keeps=keeps)
        units = (ids_of(batch(number)) for number in numbers)
        loader = self.asker.follow(list(numbers), units, most=None, num_bytes=LARGEST)
        self.batches: Iterator[Any] = iter(loader)

    def step(self) -> None:
        number = next(self.batches)
        assert_reads(reader(self.folder), batch(number))
        self.asker.step_ended()

    def names(self) -> set[str]:
        return self.folder.listing().segments

    def until_asked(self, *numbers: int) -> None:
        wanted = {name(number) for number in numbers}
        until(lambda: self.folder.listing().asks.keys() == wanted)


def name(number: int) -> str:
    return Ask.of(0, ids_of(batch(number))).name


def size_of(folder: ReplicaFolder) -> int:
    return sum(folder.segment(each).stat().st_size for each in folder.listing().segments)


def test_no_more_is_asked_for_than_there_is_room_and_what_was_used_goes(tmp_path: Path) -> None:
    run = Training(stream(tmp_path), range(12), 3.5)
    run.asker.begin()
    largest = 0
    for number in range(12):
        until(lambda number=number: name(number) in run.folder.listing().asks or name(number) in run.names())  # type: ignore[misc]
        for _ in range(4):
            answer_all(run.claims)
        largest = max(largest, size_of(run.folder) + LARGEST * len(run.folder.listing().asks))
        run.step()
        until(lambda number=number: name(number) not in run.names())  # type: ignore[misc]
    assert 3 * LARGEST * 0.8 < largest <= 3.5 * LARGEST
    run.asker.end(is_over=True)
    assert run.folder.listing().asks == {}
    assert run.names() == set()
    assert read_sign(run.folder.student)["state"] == "ended"  # type: ignore[index]


def test_the_order_is_that_of_the_loader(tmp_path: Path) -> None:
    run = Training(stream(tmp_path), [4, 1, 3], 20)
    run.asker.begin()
    run.until_asked(4, 1, 3)
    found = [run.claims.take(1, 1)[0][0].ask.name for _ in range(3)]
    assert found == [name(4), name(1), name(3)]
    run.asker.end(is_over=False)
    assert read_sign(run.folder.student)["state"] == "stopped"  # type: ignore[index]


def test_a_validation_is_asked_for_a_little_ahead_and_before_the_training(tmp_path: Path) -> None:
    run = Training(stream(tmp_path), range(10), 6)
    validation = run.asker.follow(
        range(50, 60), (ids_of(batch(number)) for number in range(50, 60)), most=2, num_bytes=2 * LARGEST
    )
    run.asker.begin()
    until(lambda: len(run.folder.listing().asks) >= 6)
    order = sorted((place, each) for each, place in run.folder.listing().asks.items())
    assert [each for _, each in order[:3]] == [*sorted([name(0), name(50)]), name(51)]
    assert name(52) not in run.folder.listing().asks
    answer_all(run.claims)
    run.step()
    for number, given in enumerate(validation, 50):
        assert given == number
        until(lambda number=number: name(number) in run.folder.listing().asks or name(number) in run.names())  # type: ignore[misc]
        [[first]] = run.claims.take(1, 1) or [[None]]
        if first is not None:
            answer(first)
            assert first.ask.name in {name(n) for n in range(50, 60)} | {name(n) for n in range(10)}
        answer_all(run.claims)
        assert_reads(reader(run.folder), batch(number))
        run.asker.step_ended()
    run.asker.end(is_over=False)


def test_a_micro_batch_that_comes_again_is_there_as_often(tmp_path: Path) -> None:
    run = Training(stream(tmp_path), [0, 0, 1, 0], 20)
    run.asker.begin()
    run.until_asked(0, 1)
    answer_all(run.claims)
    for _ in range(3):
        run.step()
        time.sleep(0.05)
    run.step()
    until(lambda: run.names() == set())
    run.asker.end(is_over=False)


def test_a_resumed_run_finds_what_no_checkpoint_has(tmp_path: Path) -> None:
    run = Training(stream(tmp_path), range(12), 8, keeps=True)
    run.asker.begin()
    until(lambda: len(run.folder.listing().asks) >= 7)
    answer_all(run.claims)
    run.step()
    run.step()
    whole = run.asker.save()
    run.step()
    whole()  # in the background: the third step is not in it
    until(lambda: not {name(0), name(1)} & run.names())
    for _ in range(3):
        until(lambda: name(11) in run.names() or answer_all(run.claims) >= 0)
        run.step()
    time.sleep(0.1)
    assert {name(2), name(3), name(4)} <= run.names()
    assert size_of(run.folder) <= 8 * LARGEST
    run.asker.end(is_over=False)
    there = run.names()
    (tmp_path / "stream" / "0" / "student.json").unlink()  # as after a kill, and a while
    again = Training(run.folder, range(2, 12), 8, keeps=True)
    states = {each: os.stat(run.folder.segment(each)).st_mtime_ns for each in there}
    again.asker.begin()
    until(lambda: len(run.folder.listing().asks) > 0 or name(9) in there)
    assert again.names() == there
    assert not again.folder.listing().asks.keys() & there
    assert {each: os.stat(run.folder.segment(each)).st_mtime_ns for each in there} == states
    again.asker.end(is_over=False)


def test_what_a_dead_run_left_goes_if_nobody_asks_for_it(tmp_path: Path) -> None:
    folder = stream(tmp_path)
    run = Training(folder, range(50, 56), 20)
    run.asker.begin()
    run.until_asked(*range(50, 56))
    [[one]] = run.claims.take(1, 1)
    answer(one)
    run.claims.take(1, 1)  # and a claim is left
    run.asker.end(is_over=False)
    folder.student.unlink()
    other = Training(folder, [3, 50], 20)
    other.asker.begin()
    other.until_asked(3)
    assert other.names() == {name(50)}
    assert folder.listing().claims == set()
    other.asker.end(is_over=False)


def test_what_gets_lost_is_asked_for_again_and_late_answers_go(tmp_path: Path) -> None:
    run = Training(stream(tmp_path), range(3), 20)
    run.asker.begin()
    run.until_asked(0, 1, 2)
    [[one]] = run.claims.take(1, 1)
    answer(one)
    flip(run.folder.segment(one.ask.name), -1)
    run.folder.segment(one.ask.name).unlink()  # as a rank does that finds the damage
    run.folder.ask(1000, name(1)).unlink()
    run.until_asked(0, 1, 2)
    late = Ask.of(0, ids_of(batch(90)))
    run.folder.write_ask(0, late.name, late.content())
    [[claimed]] = run.claims.take(1, 1)
    until(lambda: late.name not in run.folder.listing().asks)
    answer(claimed) if claimed.ask.name == late.name else claimed.give_back()
    until(lambda: late.name not in run.names())
    run.asker.end(is_over=False)


def test_abandoned_files_go_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Training(stream(tmp_path), range(1), 20)
    left = run.folder.path / ".x.safetensors.host.1.ab.unfinished"
    left.touch()
    run.asker.begin()
    time.sleep(0.1)
    assert left.exists()
    monkeypatch.setattr(asker_module, "_ABANDONED_S", 0.05)
    until(lambda: not left.exists())
    until(lambda: run.asker._watch._seen == {})
    run.asker.end(is_over=False)


def test_a_failure_is_told_to_all_ranks(tmp_path: Path) -> None:
    folder = stream(tmp_path)
    asker = Asker(folder, IDENTITY, LARGEST, keeps=False)

    def units() -> Iterator[Any]:
        raise ValueError("data: sample 3 cannot be read")
        yield

    asker.follow([], units(), most=None, num_bytes=0)
    asker.begin()
    until(lambda: "failure" in (read_sign(folder.student) or {}))
    with pytest.raises(ValueError, match="^asking the producers has failed: data: sample 3 cannot be read$"):
        reader(folder, 1.0)._look(asker._watch, Counter(), Ask.of(0, [unit(3)[0]]))
    with pytest.raises(ValueError, match="sample 3 cannot be read"):
        asker.step_ended()
    asker.end(is_over=False)


def test_a_second_training_is_refused(tmp_path: Path) -> None:
    folder = stream(tmp_path)
    sign = Sign(folder.student, state="running")
    with pytest.raises(ValueError, match="another training follows this stream .*student.json changes"):
        check_alone(tmp_path)
    sign.close()
    check_alone(tmp_path)


def test_batches_without_units_are_not_asked_for(tmp_path: Path) -> None:
    folder = stream(tmp_path)
    asker = Asker(folder, IDENTITY, 20 * LARGEST, keeps=False)
    loader = asker.follow(range(3), iter([[], ids_of(batch(0)), []]), most=None, num_bytes=0)
    asker.begin()
    claims = Claims(tmp_path, "a")
    until(lambda: answer_all(claims) > 0)
    for _ in loader:
        asker.step_ended()
    until(lambda: folder.listing().segments == set())
    asker.end(is_over=False)
