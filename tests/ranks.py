"""Live ranks for tests: processes that share one gloo group and are reused from test to test.

`@distributed(tp=2)` on an ordinary pytest function runs its body on every rank of such a pool.
Starting a pool costs about a second, a test on a live one some 20 milliseconds.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import faulthandler
import functools
import importlib
import inspect
import multiprocessing
import os
import random
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal

import pytest

# Imported once by the fork server: every rank is a copy of it.
PRELOAD = [
    "tests.rank_image",
    "pytest",
    "torch",
    "megatron.training.training",
    "megatron.training.models.gpt",
    "megatron.training.argument_utils",
    "megatron_fdd.rehearsal",
]
# Beyond this many live processes the pool that has waited longest is closed (each holds 100 to 300 MB).
MAX_LIVE_RANKS = 12
# Of so many layouts a rank keeps the groups: some 24 each, with threads and sockets.
MAX_LAYOUTS = 4
BOOT_TIMEOUT_S = 120.0
# After the first bad outcome the other ranks get this long to report; then they count as hung.
GRACE_S = 2.0
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Layout:
    """How many ranks, and Megatron's parallel sizes on them.

    With `ranks` set, nothing but the world group exists when the body starts; otherwise Megatron's
    parallel state does, over tp * pp * cp * dp ranks. `ep` is taken out of tp * cp * dp, as Megatron does.
    """

    ranks: int | None = None
    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1
    ep: int = 1
    vpp: int | None = None

    def __post_init__(self) -> None:
        if self.ranks is not None and self.model_size * self.ep * (self.vpp or 1) != 1:
            raise ValueError("give `ranks` for a bare world group, or parallel sizes, not both")

    @property
    def model_size(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def world_size(self) -> int:
        return self.ranks or self.model_size


@dataclass(frozen=True, slots=True)
class Call:
    """A test body by name, so that only plain data crosses the border between processes."""

    module: str
    function: str
    arguments: dict[str, Any]
    layout: Layout


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one rank reports of one call."""

    rank: int
    status: Literal["passed", "skipped", "failed", "died", "hung"]
    detail: str = ""
    value: Any = field(default=None, compare=False)

    @property
    def bad(self) -> bool:
        return self.status in ("failed", "died", "hung")


def distributed(
    *,
    ranks: int | None = None,
    tp: int = 1,
    pp: int = 1,
    cp: int = 1,
    dp: int = 1,
    ep: int = 1,
    vpp: int | None = None,
    timeout_s: float = 120.0,
) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """Run a pytest function on every rank of a live pool; see `Layout` for the sizes.

    Parameters and fixtures must be plain data that pickles (`tmp_path` is; `monkeypatch` is not).
    """
    layout = Layout(ranks, tp, pp, cp, dp, ep, vpp)

    def decorate(body: Callable[..., Any]) -> Callable[..., None]:
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
) -> list[Any]:
    """Call a module-level function on every rank; its results in the order of ranks.

    Fails (or skips) the calling test when a rank fails, dies, hangs (or skips).
    """
    call = Call(body.__module__, body.__qualname__, arguments or {}, layout)
    outcomes = _pool(layout.world_size).run(call, timeout_s)
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


_POOLS: dict[int, Pool] = {}  # by size, the one used last at the end


def _pool(size: int) -> Pool:
    pool = _POOLS.pop(size, None)
    if pool is None or not pool.healthy:
        while _POOLS and sum(_POOLS) + size > MAX_LIVE_RANKS:
            _POOLS.pop(next(iter(_POOLS))).close()
        pool = Pool(size)
    _POOLS[size] = pool
    return pool


def _report(outcomes: list[Outcome]) -> str:
    """The cause first: a death before a failure (peers fail when a rank dies), hangs last."""
    order = {"died": 0, "failed": 1, "hung": 2, "skipped": 3, "passed": 3}
    cause, *others = sorted(outcomes, key=lambda outcome: order[outcome.status])
    parts = [f"rank {cause.rank} {cause.status} first: {cause.detail}"]
    parts += [f"rank {other.rank} {other.status}: {other.detail}".rstrip(": ") for other in others]
    return "\n\n".join(parts)


class Pool:
    """`size` processes; a call runs on all of them at once. After a bad outcome it is dead."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._directory = tempfile.TemporaryDirectory(prefix="ranks-")
        root = Path(self._directory.name)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self._stack_files = [root / f"rank{rank}.stack" for rank in range(size)]
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            seat = (rank, size, root / "rendezvous", self._stack_files[rank], theirs)
            # Not daemonic: those may have no children, and Megatron's data loaders are children.
            process = context.Process(target=_serve, name=f"rank{rank}", args=seat, daemon=False)
            process.start()
            theirs.close()  # so that a dead rank reads as end of file here
            self._pipes.append(ours)
            self._processes.append(process)
        outcomes = self._collect(BOOT_TIMEOUT_S)
        if any(outcome.bad for outcome in outcomes):
            raise RuntimeError(f"the ranks did not start\n{_report(outcomes)}")

    @property
    def healthy(self) -> bool:
        return all(process.is_alive() for process in self._processes)

    def run(self, call: Call, timeout_s: float) -> list[Outcome]:
        """One outcome per rank, in the order in which they came in."""
        for pipe in self._pipes:
            pipe.send(call)
        return self._collect(timeout_s)

    def close(self) -> None:
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            if process.is_alive():
                pipe.send(None)
        for process in self._processes:
            process.join(timeout=5)
        self._kill()

    def _collect(self, timeout_s: float) -> list[Outcome]:
        outcomes: list[Outcome] = []
        waiting = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        deadline = time.monotonic() + timeout_s
        while waiting and (left_s := deadline - time.monotonic()) > 0:
            for pipe in wait(list(waiting), timeout=left_s):
                outcomes.append(self._receive(pipe, waiting.pop(pipe)))
                if outcomes[-1].bad:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        outcomes += self._hung(sorted(waiting.values()), timeout_s)
        if any(outcome.bad for outcome in outcomes):
            self._kill()  # its collectives may be out of step: never reuse it
        return outcomes

    def _receive(self, pipe: Connection, rank: int) -> Outcome:
        try:
            return pipe.recv()
        except EOFError:
            self._processes[rank].join(timeout=1)
            return Outcome(rank, "died", f"exit code {self._processes[rank].exitcode}")

    def _hung(self, ranks: list[int], timeout_s: float) -> list[Outcome]:
        for rank in ranks:
            if self._processes[rank].is_alive():
                os.kill(self._processes[rank].pid, signal.SIGUSR1)
        time.sleep(0.2 if ranks else 0)  # the time to write the stacks
        return [
            Outcome(
                rank,
                "hung",
                f"no answer within {timeout_s:g} s, innermost frame first\n\n{self._stack(rank)}",
            )
            for rank in ranks
        ]

    def _stack(self, rank: int) -> str:
        frames = self._stack_files[rank].read_text().splitlines()
        return "\n".join(frame for frame in frames if "multiprocessing" not in frame)

    def _kill(self) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()  # its group exists only once it runs
            process.join()
        self._directory.cleanup()


def _serve(rank: int, size: int, rendezvous: Path, stack_file: Path, pipe: Connection) -> None:
    """Life of one rank: join the others, then run what comes until None or end of file."""
    stack = stack_file.open("w")
    faulthandler.register(signal.SIGUSR1, file=stack, all_threads=False)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # no rank outlives the tests
    os.setsid()  # a rank ends with its data loaders and whatever else it started
    try:
        _join(rank, size, rendezvous)
    except BaseException as error:
        pipe.send(_failure(rank, error))
        return
    pipe.send(Outcome(rank, "passed"))
    try:
        while (call := pipe.recv()) is not None:
            pipe.send(_run(call, rank))
    except EOFError:
        pass
    os._exit(0)  # neither gloo's threads nor exit handlers of half-finished runs are waited for


def _join(rank: int, size: int, rendezvous: Path) -> None:
    import torch
    import torch.distributed as dist

    from megatron_fdd import rehearsal

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(size), "GLOO_SOCKET_IFNAME": "lo"}
    rehearsal.start()
    torch.set_num_threads(1)
    _rewrite_asserts()
    _NO_LAYOUT.update(_parallel_state())
    store = dist.FileStore(str(rendezvous), size)
    dist.init_process_group("gloo", rank=rank, world_size=size, store=store, timeout=timedelta(minutes=10))


def _run(call: Call, rank: int) -> Outcome:
    import torch
    import torch.distributed as dist

    environment = dict(os.environ)
    outcome = Outcome(rank, "passed")
    try:
        torch.manual_seed(0)
        random.seed(0)
        if call.layout.ranks is None:
            _enter_layout(call.layout)
        body = getattr(importlib.import_module(call.module), call.function)
        try:
            outcome = Outcome(rank, "passed", value=inspect.unwrap(body)(**call.arguments))
        except pytest.skip.Exception as skip:
            outcome = Outcome(rank, "skipped", str(skip))
        dist.barrier()  # a collective that only some ranks entered shows up here
        clean_megatron()
    except BaseException as error:
        outcome = _failure(rank, error)
    os.environ.clear()
    os.environ |= environment
    return outcome


def _failure(rank: int, error: BaseException) -> Outcome:
    """The message before the traceback."""
    message, trace = traceback.format_exception_only(error), traceback.format_tb(error.__traceback__)
    return Outcome(rank, "failed", "".join([*message, "\n", *trace]))


def _enter_layout(layout: Layout) -> None:
    """Set Megatron's parallel state for `layout`; the groups of recent layouts are kept (0.4 s saved)."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    state = _LAYOUTS.pop(layout, None)
    if state is None:
        if len(_LAYOUTS) == MAX_LAYOUTS:
            _LAYOUTS.pop(next(iter(_LAYOUTS)))
        parallel_state.initialize_model_parallel(
            layout.tp,
            layout.pp,
            layout.vpp,
            context_parallel_size=layout.cp,
            expert_model_parallel_size=layout.ep,
        )
        state = _parallel_state()
    _LAYOUTS[layout] = state
    _set_parallel_state(state)
    model_parallel_cuda_manual_seed(0, force_reset_rng=True)


# On a rank: the parallel states of the last layouts, and the one in which it was born.
_LAYOUTS: dict[Layout, dict[str, Any]] = {}
_NO_LAYOUT: dict[str, Any] = {}


def _parallel_state() -> dict[str, Any]:
    from megatron.core import parallel_state

    return {
        name: copy.copy(value) if isinstance(value, list | dict) else value
        for name, value in vars(parallel_state).items()
        if name.startswith("_") and not name.startswith("__") and not callable(value)
    }


def _set_parallel_state(state: dict[str, Any]) -> None:
    from megatron.core import parallel_state

    for name, value in state.items():
        setattr(parallel_state, name, copy.copy(value) if isinstance(value, list | dict) else value)


def clean_megatron() -> None:
    """Forget what a run of Megatron left in this process; the world group stays.

    For bodies that call the entry point more than once; every body ends with it anyway.
    Every rank must call it: it ends process groups.
    """
    import torch.distributed as dist
    from megatron.core.tensor_parallel import random as tensor_parallel_random
    from megatron.training import checkpointing, training

    _set_parallel_state(_NO_LAYOUT)  # first: Megatron would end the gloo groups of kept layouts
    training.destroy_global_state()
    tensor_parallel_random._CUDA_RNG_STATE_TRACKER = None
    tensor_parallel_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = False
    checkpointing._CHECKPOINT_VERSION = checkpointing._LOADED_ITERATION = None
    # Megatron drops its groups without ending them: their threads and sockets would pile up.
    kept = {id(value) for state in _LAYOUTS.values() for value in _flat(state.values())}
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD and id(group) not in kept:
            dist.destroy_process_group(group)
    for name in [name for name in os.environ if name.startswith("NVTE_")]:
        del os.environ[name]  # Megatron refuses another attention backend while they are set
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signal_number, signal.SIG_DFL)


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        yield from _flat(value) if isinstance(value, list) else (value,)


def _rewrite_asserts() -> None:
    """Give test modules imported on a rank the assert messages that pytest gives them."""
    from _pytest.assertion import install_importhook
    from _pytest.config import get_config

    config = get_config()
    config.parse(["-p", "no:cacheprovider"])
    install_importhook(config)
