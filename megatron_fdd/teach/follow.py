"""The loop of a stream's producer: what a training asks for goes through an engine, and back as segments."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_fdd.data.store.coverage import Unit
from megatron_fdd.data.store.identity import StoreIdentity
from megatron_fdd.data.store.segment import Bytes, write_segment
from megatron_fdd.data.stream.asker import bytes_of
from megatron_fdd.data.stream.claims import Claimed, Claims
from megatron_fdd.data.stream.folder import left_path, producer_path, replicas
from megatron_fdd.data.stream.sign import Clock, Sign, Watch, read_sign
from megatron_fdd.host import console
from megatron_fdd.host.process import ended_like_interrupt, is_first_rank
from megatron_fdd.teach.engine import Engine
from megatron_fdd.teach.following import Following
from megatron_fdd.teach.work import batches

# Seconds between two looks for asks, and how long the other ranks hear nothing at most.
_PAUSE_S, _QUIET_S = 0.1, 10.0
# Seconds between two lines of one kind.
_SAID_S, _TOLD_S = 60.0, 300.0

# What each of the engine's replicas answers in a round.
Round = list[list[Claimed]]


def check_window(following: Following, identity: StoreIdentity, seq_length: int) -> None:
    """Refuse a window that is smaller than the answer for one sample.

    Raises:
        ValueError: says what is needed.
    """
    need = bytes_of(identity, [seq_length])
    if following.window_bytes < need:
        raise ValueError(
            f"--window-bytes {following.window_bytes}: the features of one sample of {seq_length} tokens take {need} "
            f"bytes ({identity.form}, {len(identity.blocks)} blocks); give room for a few steps"
        )


def follow(engine: Engine, store: Path, batch_tokens: int, idle_s: float) -> None:
    """Answer what a training asks for, until it has ended or gives no sign of life.

    Rank 0 claims asks, the first rank of each of the engine's replicas writes answers, one segment an ask. Whatever
    ends this process gives its claims back, except a kill: then they go stale.

    Collectives: a broadcast of a list of asks each round, or every ten seconds; those of the engine.

    Raises:
        ValueError: the disk cannot take a segment, or a hidden state is not finite.
        KeyboardInterrupt: the process was asked to end.
    """
    with ended_like_interrupt(), _desk(store) as desk, ThreadPoolExecutor(1) as thread:
        pending: Future[None] | None = None
        while True:
            told: list[Round | str] = [[]]
            if desk is not None:
                told[0] = desk.next_round(batch_tokens, engine.num_replicas, idle_s)
            dist.broadcast_object_list(told, src=0)
            work = told[0]
            if isinstance(work, str):
                console.say(f"{work}; this producer ends")
                break
            own = work[engine.replica] if engine.replica < len(work) else []
            with _given_back([each for answers in work for each in answers] if desk else own):
                states = _run(engine, work, batch_tokens) if work else []
                if pending is not None:
                    pending.result()
                pending = None
                if own and engine.writes:
                    pending = thread.submit(_answer, store, engine.identity, own, states)
                if desk is not None:
                    desk.give(work)
        if pending is not None:
            pending.result()
        if desk is not None:
            desk.settle()


def _run(engine: Engine, work: Round, batch_tokens: int) -> list[list[Bytes]]:
    """Run the asks of a round; return the states of this replica's, ask by ask.

    All replicas run equally many batches, because experts may be shared: one that has none left runs the last one
    again and throws it away.
    """
    # A unit's place here: the number of its ask, and its own.
    cut = [
        batches(
            [
                Unit(number, place, 0, len(ids))
                for number, claimed in enumerate(answers)
                for place, ids in enumerate(claimed.ask.units)
            ],
            batch_tokens,
        )
        for answers in work
    ]
    is_busy = engine.replica < len(work)
    asks, own = (work[engine.replica], cut[engine.replica]) if is_busy else (work[0], cut[0])
    found: list[dict[int, Bytes]] = [{} for _ in asks]
    for number in range(max(map(len, cut))):
        batch = own[min(number, len(own) - 1)]
        units = [asks[unit.dataset].ask.units[unit.sample] for unit in batch]
        for unit, states in zip(batch, engine.states(units), strict=False):
            found[unit.dataset].setdefault(unit.sample, states)
    return [[states[place] for place in sorted(states)] for states in found] if is_busy else []


def _answer(
    store: Path, identity: StoreIdentity, own: Sequence[Claimed], states: Sequence[Sequence[Bytes]]
) -> None:
    """Write the answers, and take away what was asked; what nobody asks for any more is dropped."""
    with _given_back(own):
        for claimed, found in zip(own, states, strict=True):
            if not claimed.is_asked():  # nobody would remove the answer
                claimed.give_back()
                continue
            path = claimed.folder.segment(claimed.ask.name)
            units = list(zip(claimed.ask.units, found, strict=True))
            write_segment(store, path, identity.digest, units)
            claimed.answered()


@contextlib.contextmanager
def _given_back(claims: Sequence[Claimed]) -> Iterator[None]:
    """Give claims back if a `with` block fails, so that another producer answers at once."""
    try:
        yield
    except BaseException:
        for claimed in claims:
            with contextlib.suppress(OSError):
                claimed.give_back()
        raise


class _Desk:
    """What rank 0 knows of the stream: asks, the training's signs of life, and this producer's own."""

    def __init__(self, store: Path, clock: Clock = time.monotonic) -> None:
        name = f"{os.uname().nodename}-{os.getpid()}-{secrets.token_hex(3)}"
        self._store, self._clock = store, clock
        self._claims, self._watch = Claims(store, name, clock), Watch(clock)
        self.sign = Sign(producer_path(store, name), name=name, answered=0)
        self._has_seen_student = False
        self._first_signs: dict[int, Any] | None = None
        self._given: list[Claimed] = []
        self._answered = self._tokens = 0
        self._started_s = self._told_s = self._said_s = clock()
        console.say(f"{store}: producer {name} answers what a training with --fdd-teacher-follow asks for")

    def next_round(self, batch_tokens: int, num_replicas: int, idle_s: float) -> Round | str:
        """Return what to answer, or nothing after a while; or in words why there is nothing to come."""
        until_s = self._clock() + _QUIET_S
        self.settle()
        while not (found := self._claims.take(batch_tokens, num_replicas)):
            self.settle()
            why = self._look(idle_s)
            if why is not None:
                return why
            if self._clock() > until_s:
                return []
            time.sleep(_PAUSE_S)
        self._said_s, self._has_seen_student = self._clock(), True
        return found

    def give(self, work: Round) -> None:
        """Note what was run, and is being written."""
        self._given += [claimed for answers in work for claimed in answers]

    def settle(self) -> None:
        """Count the answers that are on disk by now, and say sometimes how much that is."""
        given, self._given = self._given, [each for each in self._given if each.is_open()]
        held = {id(each) for each in self._given}
        done = [each for each in given if id(each) not in held]
        if not done:
            return
        self._answered += len(done)
        self._tokens += sum(len(ids) for each in done for ids in each.ask.units)
        self.sign.tell(answered=self._answered)
        now = self._clock()
        if now - self._told_s >= _TOLD_S:
            self._told_s = now
            console.say(
                f"{self._answered} micro-batches, {self._tokens} tokens answered, "
                f"{self._tokens / (now - self._started_s):.0f} tokens/s, waiting included"
            )

    def _look(self, idle_s: float) -> str | None:
        """Look at the training's signs of life; return why this producer ends, if it does."""
        signs = {folder.replica: read_sign(folder.student) for folder in replicas(self._store)}
        states = {number: sign.get("state") for number, sign in signs.items() if sign is not None}
        running = any(state != "ended" for state in states.values())  # one that has stopped may come back
        quiet_s = self._watch.unchanged_s("students", signs)
        if states and not running and self._has_seen_student:
            return "the training has ended"
        if quiet_s >= idle_s:
            return f"no training has given a sign of life for {idle_s:g} s"
        if self._first_signs is None:
            self._first_signs = signs
        self._has_seen_student |= running and signs != self._first_signs
        now = self._clock()
        if now - self._said_s >= _SAID_S:
            self._said_s = now
            what = "the training has all that it may ask for" if quiet_s < _SAID_S else "no training follows"
            console.say(f"waiting: {what} ({self._answered} micro-batches answered)")
        return None


@contextlib.contextmanager
def _desk(store: Path) -> Iterator[_Desk | None]:
    """Give rank 0 its desk; None to other ranks."""
    if not is_first_rank():
        yield None
        return
    desk = _Desk(store)
    try:
        yield desk
    finally:
        desk.sign.leave(left_path(store))
