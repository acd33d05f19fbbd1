"""Checks of the GPUs: what torch sees of them, and with `--gpu` whether they work.

None of the checks with a GPU has run on one yet.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import torch
import torch.distributed as dist

from megatron_fdd.doctor.finding import Finding

_MESSAGE_ELEMENTS = 1 << 24  # 64 MiB of float32
_BLACKWELL = 10  # from this compute capability on, Megatron does not demand one connection
_NO_GPU = "no GPU is visible to torch"


def devices() -> Iterator[Finding]:
    """Check which GPUs are visible, and which NCCL torch brings."""
    if not torch.cuda.is_available():
        text = f"{_NO_GPU}: runs are rehearsals on CPUs"
        yield Finding("warn", "GPU", text, "on a machine with one, see nvidia-smi and CUDA_VISIBLE_DEVICES")
        return
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        text = f"{found.name}, capability {found.major}.{found.minor}, {found.total_memory / 2**30:.0f} GiB"
        yield Finding("ok", f"GPU {index}", text)
    yield Finding("ok", "NCCL", ".".join(map(str, torch.cuda.nccl.version())))


def connections() -> Iterator[Finding]:
    """Check CUDA_DEVICE_MAX_CONNECTIONS.

    Before Blackwell, Megatron demands one connection for tensor or context parallelism.
    """
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    value = os.environ.get(name, "")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    older = count > 1 and torch.cuda.get_device_properties(0).major < _BLACKWELL
    if older and value != "1":
        text = f"is {value or 'not set'}, and Megatron demands 1 for tensor or context parallelism here"
        yield Finding("warn", name, text, f"export {name}=1")
    else:
        yield Finding("ok", name, value or "not set; not needed here")


def all_reduce() -> Iterator[Finding]:
    """Check one sum through NCCL over all visible GPUs, with one process for each."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        yield Finding("FAIL", "all-reduce", _NO_GPU)
        return
    seconds = summed("nccl", count)
    rate = 4 * _MESSAGE_ELEMENTS / seconds / 1e9
    yield Finding(
        "ok", "all-reduce", f"the sum over {count} GPUs is right: {seconds:.4f} s, {rate:.1f} GB/s of message"
    )


def toy_run() -> Iterator[Finding]:
    """Check twenty steps of a toy pair on one GPU against the curve of a CPU."""
    if not torch.cuda.is_available():
        yield Finding("FAIL", "toy run", _NO_GPU)
        return
    from megatron_fdd.doctor import toy  # imports Megatron, which the other checks do not need

    distance = toy.distance(toy.steps("cuda"), toy.committed())
    text = f"{toy.NUM_STEPS} steps are within {distance:.1e} of a CPU's"
    if distance > toy.TOLERANCE:
        remedy = "do not train before this is understood: run tests/gpu/run.sh of the repository"
        yield Finding("FAIL", "toy run", f"{text}, allowed is {toy.TOLERANCE:.0e}", remedy)
    else:
        yield Finding("ok", "toy run", text)


def summed(backend: str, count: int) -> float:
    """Return the seconds that the second of two all-reduces of 64 MiB over `count` processes takes.

    Raises:
        Exception: torch's error for the first process that failed, with its traceback; a wrong sum is such a failure.
    """
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    seconds: Any = context.Array("d", count)
    torch.multiprocessing.spawn(_sum, (backend, count, port, seconds), nprocs=count)
    return max(seconds)


def _sum(rank: int, backend: str, count: int, port: int, seconds: list[float]) -> None:
    """Run one process of `summed`. Collectives over all of them: two all-reduces and two barriers."""
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=count)
    for _ in range(2):
        message = torch.full((_MESSAGE_ELEMENTS,), float(rank + 1), device=device)
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(message)
        wrong = int((message != count * (count + 1) / 2).sum())  # waits for the device
        seconds[rank] = time.perf_counter() - started
        if wrong:
            raise RuntimeError(f"all-reduce over {count} processes: {wrong} of {len(message)} sums are wrong")
    dist.destroy_process_group()
