"""All gloo groups of a process share one network loop.

A loop of gloo's looks for work a hundred times a second, and torch starts one for each of the two dozen groups
that Megatron makes: with several ranks on few cores they take the time of the training itself.
"""

from __future__ import annotations

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
    """Every gloo group that torch makes from now on is a `SharedLoopGloo`."""
    distributed_c10d.ProcessGroupGloo = SharedLoopGloo  # type: ignore[misc]
