"""All gloo groups of a process share one network loop, and no thread of gloo takes another's core.

A loop of gloo's looks for work a hundred times a second, and torch starts one for each of the two dozen groups
that Megatron makes: with several ranks on few cores they take the time of the training itself.

A thread that sends holds a lock, and the loop of the same process tries that lock again and again, without a pause.
Where there are more ranks than cores, what is sent wakes another rank, which takes the sender's core, and the loop
burns its whole time slice: a collective of a few bytes took 3.8 ms with four ranks on two cores, and takes 0.3 ms
where a thread that wakes waits for its turn (`SCHED_BATCH`).
"""

from __future__ import annotations

import contextlib
import os
from datetime import timedelta

from torch.distributed import ProcessGroupGloo, Store, distributed_c10d


class SharedLoopGloo(ProcessGroupGloo):
    """A gloo group on the process's loop, with one thread for its collectives: they run in order, as in NCCL."""

    _loop: ProcessGroupGloo.Device | None = None

    def __init__(self, store: Store, rank: int, size: int, timeout: timedelta) -> None:
        if SharedLoopGloo._loop is None:
            SharedLoopGloo._loop = ProcessGroupGloo.create_default_device()
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [SharedLoopGloo._loop]
        options._threads = 1
        options._timeout = timeout
        super().__init__(store, rank, size, options)


def install_gloo() -> None:
    """Every gloo group that torch makes from now on is a `SharedLoopGloo`.

    This thread, and every thread and process that it starts later, is scheduled as batch work, if it may be and nobody
    has chosen a policy.
    """
    # Not every system has it, and containers forbid it: then collectives are slower, and all else is the same.
    with contextlib.suppress(AttributeError, OSError):
        if os.sched_getscheduler(0) == os.SCHED_OTHER:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    distributed_c10d.ProcessGroupGloo = SharedLoopGloo  # type: ignore[misc]
