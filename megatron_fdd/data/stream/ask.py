"""Asks: the units of one micro-batch, which a student wants the features of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_fdd.data.store.segment import name_of
from megatron_fdd.data.store.store import Ids
from megatron_fdd.data.store.unit import as_ids, unit_key


@dataclass(frozen=True, slots=True)
class Ask:
    """The units of a micro-batch, each once.

    Attributes:
        place: its place in the order in which the student needs them.
        name: of the segment that answers it.
    """

    place: int
    name: str
    units: tuple[Ids, ...]

    @classmethod
    def of(cls, place: int, units: Sequence[Ids]) -> Ask:
        """Ask for the units of a micro-batch, given in its order, perhaps with some that come again."""
        different = {unit_key(ids): as_ids(ids) for ids in units}
        return cls(place, name_of(b"".join(different)), tuple(different.values()))

    @property
    def padded_tokens(self) -> int:
        """Tokens of a forward pass with one row a unit."""
        return len(self.units) * max(map(len, self.units))

    def content(self) -> bytes:
        """Return what its file holds: int32 numbers; how many units, their lengths, their ids."""
        lengths = [len(ids) for ids in self.units]
        return as_ids(np.concatenate([[len(lengths)], lengths, *self.units])).tobytes()

    @classmethod
    def read(cls, path: Path, place: int, name: str) -> Ask | None:
        """Read an ask; None if it is gone, or not what its name says."""
        try:
            numbers = np.frombuffer(path.read_bytes(), "<i4")
            edges = np.cumsum(numbers[: 1 + numbers[0]].astype(np.int64)) + 1
            units = np.split(numbers, edges)[1:-1] if edges[-1] == len(numbers) else []
            found = cls.of(place, units)
        except (OSError, ValueError, IndexError):
            return None
        return found if found.name == name and found.units else None
