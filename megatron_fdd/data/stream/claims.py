"""A producer's claims: which asks it answers, and which it takes over from producers that are dead."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_fdd.data.stream.ask import Ask
from megatron_fdd.data.stream.folder import ReplicaFolder, producers, replicas
from megatron_fdd.data.stream.sign import STALE_S, Clock, Watch

# Seconds between two looks at the claims of others.
_LOOK_S = 5.0


@dataclass(frozen=True, slots=True)
class Claimed:
    """An ask that this producer answers, and the folder that it came from."""

    folder: ReplicaFolder
    ask: Ask

    def is_asked(self) -> bool:
        """Whether the ask is still there; a student that has started again may have given it another place."""
        own = self.folder.ask(self.ask.place, self.ask.name)
        return own.exists() or self.ask.name in self.folder.listing().asks

    def is_open(self) -> bool:
        """Whether the answer is still to come: it takes ask and claim away."""
        ask = self.folder.ask(self.ask.place, self.ask.name)
        return ask.exists() or self.folder.claim(self.ask.name).exists()

    def answered(self) -> None:
        """Take ask and claim away, when the answer is there."""
        self.folder.ask(self.ask.place, self.ask.name).unlink(missing_ok=True)
        self.give_back()

    def give_back(self) -> None:
        """Take the claim away, so that another producer answers."""
        self.folder.claim(self.ask.name).unlink(missing_ok=True)


class Claims:
    """What a producer takes of the asks of a stream: the first ones that nobody has, in the students' order.

    Two producers that answer the same ask make the same file, so that a slow one that was taken for dead does no harm.

    Args:
        producer: its name, by which its sign of life is found.
        clock: of this process.
    """

    def __init__(self, store: Path, producer: str, clock: Clock = time.monotonic) -> None:
        self._store, self._producer = store, producer
        self._clock, self._watch = clock, Watch(clock)
        self._looked_s = -math.inf
        # Claims of dead producers, and whose they are.
        self._stale: dict[Path, str] = {}

    def take(self, most_tokens: int, count: int) -> list[list[Claimed]]:
        """Claim asks for a round; return them in at most `count` batches.

        Args:
            most_tokens: of a batch, with its padding; one ask may have more.
        """
        batches: list[list[Claimed]] = []
        for folder, place, name, is_claimed in self._open_asks():
            ask = Ask.read(folder.ask(place, name), place, name)
            if ask is None:  # gone, or damaged: then the student asks again
                folder.ask(place, name).unlink(missing_ok=True)
                continue
            fits = bool(batches) and _padded([*batches[-1], Claimed(folder, ask)]) <= most_tokens
            if not fits and len(batches) == count:
                break
            if not self._claim(folder.claim(name), is_claimed=is_claimed):
                continue
            claimed = Claimed(folder, ask)
            if folder.segment(name).exists() or not folder.ask(place, name).exists():
                claimed.answered()  # by another one, meanwhile or before it died
            elif fits:
                batches[-1].append(claimed)
            else:
                batches.append([claimed])
        return batches

    def _open_asks(self) -> list[tuple[ReplicaFolder, int, str, bool]]:
        """Return the asks that nobody answers, in order: folder, place, name, and whether a dead producer claims it."""
        found, claimed = [], []
        for folder in replicas(self._store):
            listing = folder.listing()
            for name, place in listing.asks.items():
                is_claimed = name in listing.claims
                if is_claimed:
                    claimed.append(folder.claim(name))
                if not is_claimed or folder.claim(name) in self._stale:
                    found.append((folder, place, name, is_claimed))
        if self._clock() - self._looked_s >= _LOOK_S:
            self._looked_s, self._stale = self._clock(), self._found_stale(claimed)
        return sorted(found, key=lambda each: (each[1], each[0].replica, each[2]))

    def _found_stale(self, claims: Sequence[Path]) -> dict[Path, str]:
        """Return the claims whose producers have given no sign of life for too long."""
        signs, stale = producers(self._store), {}
        for path in claims:
            owner = owner_of(path)
            value = owner, signs.get(owner or "", {}).get("beat")
            if self._watch.unchanged_s(path, value) >= STALE_S and owner is not None:
                stale[path] = owner
        self._watch.forget_others(claims)
        return stale

    def _claim(self, path: Path, *, is_claimed: bool) -> bool:
        """Make a claim; one of a dead producer is put aside before. Return whether this producer has it."""
        if is_claimed:
            if owner_of(path) != self._stale.pop(path, None):  # another one was quicker
                return False
            aside = path.with_name(f".{path.name}.{self._producer}")
            try:
                os.rename(path, aside)  # of several producers one can
            except FileNotFoundError:
                return False
            aside.unlink(missing_ok=True)
        try:
            with path.open("x") as file:
                file.write(self._producer)
        except FileExistsError:
            return False
        except OSError:  # the disk is full
            path.unlink(missing_ok=True)
            raise
        return True


def _padded(batch: Sequence[Claimed]) -> int:
    """Return the tokens of a forward pass of several asks, padding included."""
    units = [ids for claimed in batch for ids in claimed.ask.units]
    return len(units) * max(map(len, units))


def owner_of(path: Path) -> str | None:
    """Return the producer that a claim names; None if it is gone."""
    with contextlib.suppress(OSError):
        return path.read_text()
    return None
