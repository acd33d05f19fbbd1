"""The features of a stream, as a rank of the student reads them: it waits for an answer, and reads it as a segment."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from megatron_fdd.data.store.identity import StoreIdentity
from megatron_fdd.data.store.index import index_of
from megatron_fdd.data.store.segment import ForeignError
from megatron_fdd.data.store.store import Store, Wanted
from megatron_fdd.data.stream.ask import Ask
from megatron_fdd.data.stream.folder import ReplicaFolder, describe_left, producers
from megatron_fdd.data.stream.sign import Clock, Watch, read_sign

# Seconds between two looks for an answer: at most, and as a part of the time that was waited.
_LONGEST_PAUSE_S, _PAUSE = 0.25, 0.05
# Seconds between two looks at signs of life.
_LOOK_S = 2.0


class StreamFeatures:
    """What `taught.Features` says, of one replica's stream. A copy in a forked process waits for itself.

    Args:
        wait_s: how long to wait while no producer answers anything.
        clock: of this process.

    Attributes:
        identity: of the store.
    """

    def __init__(
        self,
        folder: ReplicaFolder,
        identity: StoreIdentity,
        wait_s: float,
        clock: Clock = time.monotonic,
    ) -> None:
        self.identity = identity
        self._folder, self._wait_s, self._clock = folder, wait_s, clock
        self._ended = threading.Event()

    def end(self) -> None:
        """Let no thread wait any longer."""
        self._ended.set()

    def read_into(self, block_numbers: Sequence[int], units: Sequence[Wanted]) -> None:
        """Read what is wanted of the units of one micro-batch, when it is there.

        An answer that is damaged is removed, and the student's first rank asks again; once.

        Raises:
            ValueError: nobody answers, two answers were damaged, or an answer is of another store.
        """
        if not any(unit.pieces for unit in units):
            return
        ask = Ask.of(0, [unit.ids for unit in units])
        path, is_second = self._folder.segment(ask.name), False
        while True:
            state = self._await(path, ask)
            try:
                self._segment(path).read_into(block_numbers, units)
            except ForeignError:
                raise
            except ValueError as error:
                now = _state_of(path)
                if now is None:  # another rank has found the damage
                    continue
                if is_second:
                    what = str(error).partition("; run ")[0]
                    raise ValueError(
                        f"--fdd-teacher-store {self._folder.store}: two answers in a row were damaged ({what}); look "
                        "at the disk, and at the machines of the producers"
                    ) from error
                is_second = True
                if now == state:
                    path.unlink(missing_ok=True)
            else:
                return

    def _segment(self, path: Path) -> Store:
        index = index_of(path, self.identity.digest, len(self.identity.blocks))
        return Store(path.parent, self.identity, index, lambda _folder, _name: path)

    def _await(self, path: Path, ask: Ask) -> tuple[int, int]:
        """Wait for an answer; return what tells it from another one of its name.

        Raises:
            ValueError: no producer has answered anything for too long, or the student's first rank has failed.
        """
        watch, answered = Watch(self._clock), Counter[str]()
        begun_s = looked_s = self._clock()
        while (state := _state_of(path)) is None:
            now = self._clock()
            if now - looked_s >= min(_LOOK_S, self._wait_s / 4):
                looked_s = now
                self._look(watch, answered, ask)
            pause_s = min(_LONGEST_PAUSE_S, max(0.002, _PAUSE * (now - begun_s)))
            if self._ended.wait(pause_s):
                raise RuntimeError("the run has ended")
        return state

    def _look(self, watch: Watch, answered: Counter[str], ask: Ask) -> None:
        """Look at the signs of life; raises what `_await` raises.

        Args:
            answered: the most that each producer has told so far in this wait; one that comes or goes is no answer.
        """
        failure = (read_sign(self._folder.student) or {}).get("failure")
        if failure is not None:
            raise ValueError(failure)
        signs = producers(self._folder.store)
        alive = {name: watch.unchanged_s(name, sign.get("beat")) for name, sign in signs.items()}
        answered |= Counter({name: sign.get("answered", 0) for name, sign in signs.items()})
        if watch.unchanged_s("all", answered.total()) >= self._wait_s:
            raise ValueError(self._why(ask, alive))

    def _why(self, ask: Ask, alive: dict[str, float]) -> str:
        """Say that nobody answers."""
        ids = ask.units[0]
        shown = f"{ids[:6].tolist()}{'...' if len(ids) > 6 else ''}"
        told = f"no producer has a sign of life there{describe_left(self._folder.store)}"
        if alive:
            name = min(alive, key=alive.__getitem__)
            told = f"the last sign of life is of {name}, {alive[name]:.0f} s ago"
            if alive[name] >= self._wait_s:
                told = f"{', '.join(sorted(alive))} gave no sign of life in that time"
        return (
            f"--fdd-teacher-store {self._folder.store}: nobody has answered anything for {self._wait_s:g} s; "
            f"{len(ask.units)} unit(s) are waited for, the first of {len(ids)} tokens, {shown}; {told}. Start fdd "
            "teach --follow again, and this training from its last checkpoint; --fdd-teacher-wait waits longer"
        )


def _state_of(path: Path) -> tuple[int, int] | None:
    """Return what tells a file from another one that comes in its place; None if it is not there."""
    try:
        state = path.stat()
    except FileNotFoundError:
        return None
    return state.st_ino, state.st_mtime_ns
