"""Checks of the machine: shared memory, open files, disk, cores, the compiler's cache."""

from __future__ import annotations

import getpass
import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megatron_fdd.doctor.finding import Finding

GIB = 1 << 30
SHARED_MEMORY = Path("/dev/shm")
MIN_SHARED_BYTES = GIB
MIN_OPEN_FILES = 4096
MIN_DISK_BYTES = 10 * GIB


def shared_memory() -> Iterator[Finding]:
    """Check the size of shared memory.

    Workers of data loaders hand over their batches in it, and with NCCL the ranks of one machine their messages.
    """
    size = shutil.disk_usage(SHARED_MEMORY).total
    text = f"{size / GIB:.1f} GiB"
    if size < MIN_SHARED_BYTES:
        remedy = "a container gets more with --shm-size or --ipc=host; without: --num-workers 0"
        yield Finding("warn", str(SHARED_MEMORY), f"{text}; data loaders and NCCL use it", remedy)
    else:
        yield Finding("ok", str(SHARED_MEMORY), text)


def open_files() -> Iterator[Finding]:
    """Check the limit of open files.

    Each rank opens sockets to its peers, its shards of checkpoints and the files of its data.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < MIN_OPEN_FILES:
        text = f"{soft} open files at most; sockets between ranks, checkpoint shards and data files add up"
        most = "unlimited" if hard == resource.RLIM_INFINITY else str(hard)
        yield Finding("warn", "ulimit -n", text, f"ulimit -n {MIN_OPEN_FILES} (the hard limit is {most})")
    else:
        yield Finding("ok", "ulimit -n", "unlimited" if soft == resource.RLIM_INFINITY else str(soft))


def free_disk() -> Iterator[Finding]:
    """Check the free space of the current folder, where checkpoints go unless told otherwise."""
    free = shutil.disk_usage(Path.cwd()).free
    text = f"{free / GIB:.0f} GiB free in this folder"
    if free < MIN_DISK_BYTES:
        remedy = "a checkpoint of bf16 weights with Adam's state takes 14 bytes a parameter; --save elsewhere"
        yield Finding("warn", "disk", text, remedy)
    else:
        yield Finding("ok", "disk", text)


def cores() -> Iterator[Finding]:
    """Check the threads of each rank against the cores that this process may use."""
    count, asked = len(os.sched_getaffinity(0)), os.environ.get("OMP_NUM_THREADS")
    if asked is None:
        yield Finding(
            "ok", "cores", f"{count}; OMP_NUM_THREADS is not set: torchrun sets 1 for several ranks"
        )
    elif not asked.isdecimal() or int(asked) > count:
        remedy = f"set it to {count} divided by the ranks of this machine"
        yield Finding("warn", "cores", f"{count}, and OMP_NUM_THREADS={asked} threads in each rank", remedy)
    else:
        yield Finding("ok", "cores", f"{count}, OMP_NUM_THREADS={asked}")


def compiler_cache() -> Iterator[Finding]:
    """Check the folder into which torch compiles.

    On a GPU these are Megatron's fused functions.
    """
    folder = Path(
        os.environ.get("TORCHINDUCTOR_CACHE_DIR")
        or Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}"
    )
    nearest = next(each for each in (folder, *folder.parents) if each.exists())
    if os.access(nearest, os.W_OK | os.X_OK):
        yield Finding("ok", "compiler cache", str(folder))
    else:
        remedy = "set TORCHINDUCTOR_CACHE_DIR to a folder that can be written"
        yield Finding(
            "FAIL", "compiler cache", f"{folder} cannot be written, and torch compiles there", remedy
        )
