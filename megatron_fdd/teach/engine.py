"""The interfaces of a teacher: prepared, and as an engine that gives the hidden states of units of text."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
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


class PreparedTeacher(Protocol):
    """A teacher whose command line was read and checked, and which is not loaded.

    Attributes:
        args: the training's, as far as they concern the data: validated, and Megatron's globals.
        companions: a folder with `hf/` and `tokenizer/`, where the teacher has them.
        outline: what the store of its features holds, as far as that is known before it is loaded.
        unknown: fields of `outline` that are not.
    """

    args: argparse.Namespace
    companions: Path
    outline: StoreIdentity
    unknown: frozenset[str]

    def start(self) -> None:
        """Make the process groups. Collectives: Megatron's initialization, if any."""

    def engine(self) -> Engine:
        """Load the teacher; return it, ready to run, on every rank.

        Collectives: those of the checks of its files, and of loading.

        Raises:
            ValueError: the teacher cannot be loaded, does not know the data's ids, or is not made as a lens needs it.
        """
