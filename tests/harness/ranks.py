"""Live ranks for tests: processes that share one gloo group and are reused from test to test.

`@distributed(tp=2)` on an ordinary pytest function runs its body on every rank of such a pool. Starting a pool
costs about a second; a test on a live pool costs some 20 milliseconds.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing.process
import os
import signal
import tempfile
import time
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from tests.harness import tiers
from tests.harness.rank_process import Call, Layout, Outcome, clean_megatron, serve

__all__ = ["Layout", "clean_megatron", "close_pools", "distributed", "run_on_ranks"]

# Imported once by a fork server, an image first: every rank is a copy of it.
IMAGE = "tests.harness.rank_image"
PRELOAD = [
    "pytest",
    "megatron.training.training",
    "megatron.training.models.gpt",
    "tests.harness.megatron_parser",
]
# With more live processes than this, the pool that has waited longest is closed (each process takes 30 MB).
MAX_LIVE_RANKS = 12
BOOT_TIMEOUT_S = 120.0
# After the first bad outcome the other ranks get this long to report; then they count as hung.
GRACE_S = 2.0


def distributed(
    *,
    ranks: int | None = None,
    tp: int = 1,
    pp: int = 1,
    cp: int = 1,
    dp: int = 1,
    ep: int = 1,
    etp: int | None = None,
    vpp: int | None = None,
    timeout_s: float = 120.0,
) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """Run a pytest function on every rank of a live pool; see `Layout` for the sizes.

    Parameters and fixtures must be plain data that pickles (`tmp_path` is; `monkeypatch` is not).
    """
    layout = Layout(ranks, tp, pp, cp, dp, ep, etp, vpp)

    def decorate(body: Callable[..., Any]) -> Callable[..., None]:
        @pytest.mark.tier("default")
        @functools.wraps(body)
        def test(**arguments: Any) -> None:
            run_on_ranks(body, layout, arguments, timeout_s=timeout_s)

        return test

    return decorate


def run_on_ranks(
    body: Callable[..., Any],
    layout: Layout,
    arguments: dict[str, Any] | None = None,
    *,
    timeout_s: float = 120.0,
    image: str = IMAGE,
) -> list[Any]:
    """Call a module-level function on every rank; return its results (plain data) in the order of ranks.

    Args:
        image: the module in whose state every rank is born.

    Fails (or skips) the calling test when a rank fails, dies, hangs (or skips).
    """
    tiers.refuse_in_fast("live ranks")
    call = Call(body.__module__, body.__qualname__, arguments or {}, layout)
    outcomes = _pool(layout.world_size, image).run(call, timeout_s)
    if any(outcome.bad for outcome in outcomes):
        pytest.fail(_report(outcomes), pytrace=False)
    skipped = [outcome for outcome in outcomes if outcome.status == "skipped"]
    if skipped:
        pytest.skip(skipped[0].detail)
    return [outcome.value for outcome in sorted(outcomes, key=lambda outcome: outcome.rank)]


def close_pools() -> None:
    """End every live rank (tests/conftest.py calls this when the session ends)."""
    while _POOLS:
        _POOLS.popitem()[1].close()


_POOLS: dict[tuple[int, str], Pool] = {}  # by size and image, the one used last at the end


def _pool(size: int, image: str) -> Pool:
    pool = _POOLS.pop((size, image), None)
    if pool is None or not pool.healthy:
        while _POOLS and sum(pool.size for pool in _POOLS.values()) + size > MAX_LIVE_RANKS:
            _POOLS.pop(next(iter(_POOLS))).close()
        pool = Pool(size, image)
    _POOLS[size, image] = pool
    return pool


@functools.cache
def _fork_server(image: str) -> forkserver.ForkServer:
    """Return the fork server of an image; multiprocessing itself knows only one server, with one image."""
    server = forkserver.ForkServer()
    server.set_forkserver_preload([image, *PRELOAD])
    return server


def _report(outcomes: list[Outcome]) -> str:
    """Return the outcomes as text, the cause first.

    A death comes before a failure (peers fail when a rank dies), hangs come last.
    """
    order = {"died": 0, "failed": 1, "hung": 2, "skipped": 3, "passed": 3}
    cause, *others = sorted(outcomes, key=lambda outcome: order[outcome.status])
    parts = [f"rank {cause.rank} {cause.status} first: {cause.detail}"]
    parts += [f"rank {other.rank} {other.status}: {other.detail}".rstrip(": ") for other in others]
    return "\n\n".join(parts)


class Pool:
    """A pool of `size` processes; a call runs on all of them at once. After a bad outcome it is dead."""

    def __init__(self, size: int, image: str) -> None:
        self.size = size
        self._directory = tempfile.TemporaryDirectory(prefix="ranks-")
        root = Path(self._directory.name)
        context = multiprocessing.get_context("forkserver")
        server = _fork_server(image)
        self._stack_files = [root / f"rank{rank}.stack" for rank in range(size)]
        self._pipes: list[Connection] = []
        self._processes: list[multiprocessing.process.BaseProcess] = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            seat = (rank, size, root / "rendezvous", self._stack_files[rank], theirs)
            # Not daemonic: those may have no children, and Megatron's data loaders are children.
            process = context.Process(target=serve, name=f"rank{rank}", args=seat, daemon=False)
            with patch.object(forkserver, "connect_to_new_process", server.connect_to_new_process):
                process.start()
            theirs.close()  # so that a dead rank reads as end of file here
            self._pipes.append(ours)
            self._processes.append(process)
        outcomes = self._collect(BOOT_TIMEOUT_S)
        if any(outcome.bad for outcome in outcomes):
            raise RuntimeError(f"the ranks did not start\n{_report(outcomes)}")

    @property
    def healthy(self) -> bool:
        """Whether every process is alive."""
        return all(process.is_alive() for process in self._processes)

    def run(self, call: Call, timeout_s: float) -> list[Outcome]:
        """Run a call; return one outcome for each rank, in the order in which they arrived."""
        for pipe in self._pipes:
            pipe.send(call)
        return self._collect(timeout_s)

    def close(self) -> None:
        """End the processes."""
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            if process.is_alive():
                pipe.send(None)
        for process in self._processes:
            process.join(timeout=5)
        self._kill()

    def _collect(self, timeout_s: float) -> list[Outcome]:
        outcomes: list[Outcome] = []
        waiting = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        start = time.monotonic()
        deadline = start + timeout_s
        while waiting and (left_s := deadline - time.monotonic()) > 0:
            ready = wait(list(waiting), timeout=left_s)
            for pipe in [pipe for pipe in waiting if pipe in ready]:
                outcomes.append(self._receive(pipe, waiting.pop(pipe)))
                if outcomes[-1].bad:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        outcomes += self._hung(list(waiting.values()), time.monotonic() - start)
        if any(outcome.bad for outcome in outcomes):
            self._kill()  # its collectives may be out of step: never reuse it
        return outcomes

    def _receive(self, pipe: Connection, rank: int) -> Outcome:
        try:
            return pipe.recv()
        except EOFError:
            self._processes[rank].join(timeout=1)
            return Outcome(rank, "died", f"exit code {self._processes[rank].exitcode}")

    def _hung(self, ranks: list[int], elapsed_s: float) -> list[Outcome]:
        for rank in ranks:
            if self._processes[rank].is_alive():
                os.kill(_pid(self._processes[rank]), signal.SIGUSR1)
        title = f"no answer after {elapsed_s:.0f} s, innermost frame first"
        return [Outcome(rank, "hung", f"{title}\n{self._stack(rank)}") for rank in ranks]

    def _stack(self, rank: int) -> str:
        deadline = time.monotonic() + GRACE_S
        while "most recent call" not in (stack := self._stack_files[rank].read_text()):
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)  # the rank writes it when it is scheduled
        return "\n".join(frame for frame in stack.splitlines() if "multiprocessing" not in frame)

    def _kill(self) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(_pid(process), signal.SIGKILL)
            process.kill()  # its group exists only once it runs
            process.join()
        self._directory.cleanup()


def _pid(process: multiprocessing.process.BaseProcess) -> int:
    assert process.pid is not None, "started in Pool.__init__"
    return process.pid
