"""The interface of an engine, which runs a teacher on units of text and gives their hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from megatron_fdd.data.store.coverage import Ids
from megatron_fdd.data.store.identity import StoreIdentity
from megatron_fdd.data.store.lens import StoredLens
from megatron_fdd.data.store.segment import Bytes


class Engine(Protocol):
    """A teacher that runs.

    With several ranks every rank of a replica calls the same methods with the same units; one of them writes.

    Attributes:
        identity: what the store of its features holds.
        replica, num_replicas: which copy of the teacher this rank is a part of, and how many run side by side.
        writes: whether this rank gets the results of its replica.
    """

    identity: StoreIdentity
    replica: int
    num_replicas: int
    writes: bool

    def lens(self, units: Sequence[Ids]) -> StoredLens | None:
        """Return the teacher's lens, compared with the teacher's own logits on these units; None off the writers.

        Raises:
            ValueError: norm and head are not what the teacher makes its logits with; says what was found.
        """

    def states(self, units: Sequence[Ids]) -> list[Bytes]:
        """Run some units; return for each its packed hidden states, uint8 [T, S, P], or nothing off the writers.

        Raises:
            ValueError: a hidden state is not finite.
        """
