"""gloo groups that share one network loop in each process, with threads that do not take each other's core.

One of gloo's loops looks for work a hundred times a second, and torch starts one for each of the two dozen groups
that Megatron makes: with several ranks on few cores they take the time of the training itself.

A thread that sends holds a lock, and the loop of the same process tries that lock again and again, without a pause.
If there are more ranks than cores, the message wakes another rank, which takes the sender's core, and the loop
burns its whole time slice. With four ranks on two cores a collective of a few bytes took 3.8 ms; it takes 0.3 ms
when a woken thread waits for its turn (`SCHED_BATCH`).
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
    """Make every gloo group that torch makes from now on a `SharedLoopGloo`.

    This thread, and every thread and process that it starts later, is scheduled as batch work, if that is allowed
    and no other policy has been chosen.
    """
    # Not every system has it, and containers may forbid it: then collectives are slower, with the same results.
    with contextlib.suppress(AttributeError, OSError):
        if os.sched_getscheduler(0) == os.SCHED_OTHER:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    distributed_c10d.ProcessGroupGloo = SharedLoopGloo  # type: ignore[misc]
