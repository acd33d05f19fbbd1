"""A producer's engine and its bare model by turns, and the seconds of both."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch


@dataclass(slots=True)
class Alternation:
    """Seconds of the watched work and of the bare work, by turns: of blocks of batches, or of steps.

    Attributes:
        waits: seconds that each step of the watched kind waited for its data.
        parts: seconds of parts of the watched work, all blocks together.
    """

    ours: list[float] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    parts: dict[str, float] = field(default_factory=dict)


class Turns:
    """An engine that stands for another, and runs each block of batches through the bare model beforehand.

    While the bare model runs nothing is written: what the store's thread has begun is waited for, in the producer's
    time.
    """

    def __init__(self, engine: Any, block: int, seen: Alternation) -> None:
        from megatron_fdd.teach import produce

        self._engine, self._block, self._seen = engine, block, seen
        self._write, self._read_ids = produce._write, produce.read_ids
        self._writing = threading.Lock()
        self._count, self._started_s = 0, 0.0
        self._parts = dict.fromkeys(("ids", "states", "writing, beside it"), 0.0)
        seen.parts = self._parts

    def __getattr__(self, name: str) -> Any:
        """Return what the engine has."""
        return getattr(self._engine, name)

    def begin(self) -> None:
        """Start the clock of the producer's first block."""
        self._started_s = time.perf_counter()

    def end(self) -> None:
        """Stop the clock, when all is written."""
        self._seen.ours.append(time.perf_counter() - self._started_s)

    def states(self, units: Any) -> Any:
        """Run a batch; before the first one of a block, run the bare model on as many."""
        if self._count % self._block == 0:
            self._turn(units)
        self._count += 1
        with self._timed("states"):
            return self._engine.states(units)

    def write(self, *arguments: Any) -> None:
        """Write a batch, unless the bare model runs."""
        with self._writing, self._timed("writing, beside it"):
            self._write(*arguments)

    def read_ids(self, *arguments: Any) -> Any:
        """Read the ids of a unit."""
        with self._timed("ids"):
            return self._read_ids(*arguments)

    def _turn(self, units: Any) -> None:
        with self._writing:
            if self._count:
                self._seen.ours.append(time.perf_counter() - self._started_s)
            run = bare_pass(self._engine, units)
            if not self._count:
                run()  # creates what is created only once
            started_s = time.perf_counter()
            for _ in range(self._block):
                run()
            self._seen.bare.append(time.perf_counter() - started_s)
        self._started_s = time.perf_counter()

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        started_s = time.perf_counter()
        try:
            yield
        finally:
            self._parts[part] += time.perf_counter() - started_s


def bare_pass(engine: Any, units: Any) -> Callable[[], object]:
    """Return what runs the layers of an engine's model on some units: no head, nothing kept."""
    from megatron_fdd.teach.megatron import MegatronEngine

    if isinstance(engine, MegatronEngine):
        from megatron_fdd.data.batch import get_batch
        from megatron_fdd.step.taps import forward_with_taps, stop_before_head

        [sample] = engine._samples(units)
        batch = get_batch(iter([sample]), torch.cuda.current_device())
        run = torch.no_grad()(forward_with_taps)
        return lambda: run(engine._model, batch, [], stop_before_head)
    from megatron_fdd.teach.hf_run import run_without_head

    rows = torch.from_numpy(np.stack(units).astype(np.int64))
    return lambda: torch.no_grad()(run_without_head)(engine._model, rows)
