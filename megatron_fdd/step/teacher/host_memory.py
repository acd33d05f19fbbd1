"""Host memory in which features of a step wait, allocated once a run, and the stream of the copies to and from it.

On a GPU the memory is pinned, and copies run beside the computation. All copies are on one stream, so that memory is
written again only after it has been read. It is pinned where it lies, because torch's own allocator of pinned memory
rounds each block up to a power of 2. On CPUs there is one stream, and nothing is pinned. It has never run on a GPU.
"""

from __future__ import annotations

import mmap
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class HostCopy:
    """A tensor that waits in host memory."""

    host: Tensor  # the copy stream may still be writing it


@dataclass(frozen=True, slots=True)
class Arriving:
    """A tensor on its way to the device."""

    tensor: Tensor
    done: torch.cuda.Event

    def wait(self) -> Tensor:
        """Return the tensor; the current stream waits for it, not the host."""
        stream = torch.cuda.current_stream()
        stream.wait_event(self.done)
        self.tensor.record_stream(stream)  # it is memory of the copy stream
        return self.tensor


class HostMemory:
    """Blocks of host memory by size, which copies take and give back. The stream exists from the first copy on."""

    def __init__(self) -> None:
        self._free: defaultdict[int, list[Tensor]] = defaultdict(list)
        self._stream: torch.cuda.Stream | None = None
        self.num_bytes = 0

    def keep(self, tensor: Tensor) -> HostCopy:
        """Start to copy a tensor from the device, in the order of the current stream."""
        free = self._free[tensor.nbytes]
        block = free.pop() if free else self._allocate(tensor)
        host = block[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        stream = self._copy_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)
        return HostCopy(host)

    def fetch(self, copy: HostCopy) -> Arriving:
        """Start to copy a tensor to the device; nothing that is computed there is waited for."""
        stream = self._copy_stream()
        with torch.cuda.stream(stream):
            tensor = torch.empty_like(copy.host, device=torch.cuda.current_device())
            tensor.copy_(copy.host, non_blocking=True)
            done = torch.cuda.Event()
            done.record(stream)
        return Arriving(tensor, done)

    def free(self, copies: Iterable[HostCopy]) -> None:
        """Give back the memory of copies, which may still be fetched from it."""
        for copy in copies:
            self._free[copy.host.nbytes].append(copy.host.flatten().view(torch.uint8))

    def _copy_stream(self) -> torch.cuda.Stream:
        if self._stream is None:
            self._stream = torch.cuda.Stream()
        return self._stream

    def _allocate(self, tensor: Tensor) -> Tensor:
        """Allocate whole pages for a tensor; they stay until the process ends."""
        size = -(-max(tensor.nbytes, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
        pages = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)
        if tensor.is_cuda:
            error = torch.cuda.cudart().cudaHostRegister(pages.data_ptr(), size, 0)
            torch.cuda.check_error(int(error))
        self.num_bytes += size
        return pages
