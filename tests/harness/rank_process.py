"""One live rank of a test pool: the code that its process runs (`tests/harness/ranks.py` starts and controls it)."""

from __future__ import annotations

import copy
import ctypes
import faulthandler
import importlib
import inspect
import multiprocessing
import os
import random
import signal
import sys
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, TextIO

import pytest

# A rank keeps the groups of so many layouts: some 24 groups each, with threads and sockets.
MAX_LAYOUTS = 4
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Layout:
    """The number of ranks, and Megatron's parallel sizes on them.

    With `ranks` set, only the world group exists when the body starts. Otherwise Megatron's parallel state exists
    too, over tp * pp * cp * dp ranks. `ep` divides the ranks of a stage by `etp`, the tensor ranks of an expert:
    by default as many as those of the other layers.
    """

    ranks: int | None = None
    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1
    ep: int = 1
    etp: int | None = None
    vpp: int | None = None

    def __post_init__(self) -> None:
        if self.ranks is not None and self.model_size * self.ep * (self.vpp or 1) != 1:
            raise ValueError("give `ranks` for a bare world group, or parallel sizes, not both")

    @property
    def model_size(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tp * self.pp * self.cp * self.dp

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.ranks or self.model_size


@dataclass(frozen=True, slots=True)
class Call:
    """A test body by name, so that only plain data passes between processes."""

    module: str
    function: str
    arguments: dict[str, Any]
    layout: Layout


@dataclass(frozen=True, slots=True)
class Outcome:
    """The report of one rank on one call."""

    rank: int
    status: Literal["passed", "skipped", "failed", "died", "hung"]
    detail: str = ""
    value: Any = field(default=None, compare=False)

    @property
    def bad(self) -> bool:
        """Whether the call failed on this rank."""
        return self.status in ("failed", "died", "hung")


def serve(rank: int, size: int, rendezvous: Path, stack_file: Path, pipe: Connection) -> None:
    """Live as one rank: join the others, then run each call until None or the end of the pipe."""
    global _notes
    _notes = stack_file.open("w")
    faulthandler.register(signal.SIGUSR1, file=_notes, all_threads=False)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # no rank outlives the tests
    multiprocessing.set_start_method("fork", force=True)  # as under torchrun; here it was the pool's
    os.setsid()  # a rank ends with its data loaders and whatever else it started
    try:
        _join(rank, size, rendezvous)
    except BaseException as error:
        pipe.send(_failure(rank, error))
        return
    pipe.send(Outcome(rank, "passed"))
    try:
        while (call := pipe.recv()) is not None:
            pipe.send(run_call(call, rank))
    except EOFError:
        pass
    os._exit(0)  # neither gloo's threads nor exit handlers of half-finished runs are waited for


def note(text: str) -> None:
    """Keep a line that stands above this rank's stack if the call hangs: why this rank waits for the others."""
    if _notes is not None:
        print(text, file=_notes, flush=True)


def _join(rank: int, size: int, rendezvous: Path) -> None:
    import torch
    import torch.distributed as dist

    from megatron_fdd.host import rehearsal

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(size), "GLOO_SOCKET_IFNAME": "lo"}
    rehearsal.start()
    torch.set_num_threads(1)
    _rewrite_asserts()
    remember_no_layout()
    store = dist.FileStore(str(rendezvous), size)
    dist.init_process_group("gloo", rank=rank, world_size=size, store=store, timeout=timedelta(minutes=10))


def run_call(call: Call, rank: int) -> Outcome:
    """Run a test body on this rank and clean up after it; an error becomes an outcome."""
    import torch
    import torch.distributed as dist

    environment = dict(os.environ)
    outcome = Outcome(rank, "passed")
    if _notes is not None:
        _notes.seek(0)
        _notes.truncate()
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
    """Return the outcome of an error: the message, then the traceback."""
    message, trace = traceback.format_exception_only(error), traceback.format_tb(error.__traceback__)
    return Outcome(rank, "failed", "".join([*message, "\n", *trace]))


def _enter_layout(layout: Layout) -> None:
    """Set Megatron's parallel state for `layout`; the groups of recent layouts are kept (saves 0.4 s)."""
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
            expert_tensor_parallel_size=layout.etp,
        )
        state = _parallel_state()
    _LAYOUTS[layout] = state
    _set_parallel_state(state)
    model_parallel_cuda_manual_seed(0, force_reset_rng=True)


# On a rank: where its stack goes, and its notes.
_notes: TextIO | None = None
# On a rank: the parallel states of the last layouts, and the state in which the rank was born.
_LAYOUTS: dict[Layout, dict[str, Any]] = {}
_NO_LAYOUT: dict[str, Any] = {}


def remember_no_layout() -> None:
    """Remember the parallel state before Megatron's is made: every body starts in it."""
    _NO_LAYOUT.update(_parallel_state())


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

    This is for bodies that call the entry point more than once; it also runs after every body. Every rank must call
    it, because it ends process groups.
    """
    import torch.distributed as dist
    from megatron.core.tensor_parallel import random as tensor_parallel_random
    from megatron.core.transformer.moe import moe_logging
    from megatron.training import checkpointing, training

    _set_parallel_state(_NO_LAYOUT)  # first: Megatron would end the gloo groups of kept layouts
    training.destroy_global_state()
    moe_logging.destroy_moe_metrics_tracker()
    tensor_parallel_random._CUDA_RNG_STATE_TRACKER = None
    tensor_parallel_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = False
    checkpointing._CHECKPOINT_VERSION = checkpointing._LOADED_ITERATION = None
    # Megatron drops its groups without ending them: their threads and sockets would pile up.
    kept = {id(value) for state in _LAYOUTS.values() for value in _flat(state.values())}
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD and id(group) not in kept:
            dist.destroy_process_group(group)
    if (fp8 := sys.modules.get("transformer_engine.pytorch.quantization")) is not None:
        fp8.FP8GlobalStateManager.reset()  # otherwise it would still reduce the scales of models that are gone
    for name in [name for name in os.environ if name.startswith("NVTE_")]:
        del os.environ[name]  # Megatron refuses another attention backend while they are set
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signal_number, signal.SIG_DFL)


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        yield from _flat(value) if isinstance(value, list) else (value,)


def _rewrite_asserts() -> None:
    """Give test modules that are imported on a rank the assert messages that pytest gives them."""
    from _pytest.assertion import install_importhook
    from _pytest.config import get_config

    config = get_config()
    config.parse(["-p", "no:cacheprovider"])
    install_importhook(config)
