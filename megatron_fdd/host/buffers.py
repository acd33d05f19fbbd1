"""Memory that tensors have one after the other: the system gives its pages once."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

# Bytes of memory that is kept while no tensor has it.
MAX_IDLE_BYTES = 512 << 20
# A tensor has memory of at most so many times its size.
_MOST_TIMES = 4
# Smaller tensors are not worth it.
_MIN_BYTES = 1 << 20


class Buffers:
    """Memory of tensors that are gone, for the next ones of about their size.

    New pages cost a processor more than what is then written to them, and a conversion needs as many as a model has.
    Tensors may be made and freed in any thread.
    """

    def __init__(self, max_idle_bytes: int = MAX_IDLE_BYTES) -> None:
        self._max_idle_bytes = max_idle_bytes
        self._idle: list[Tensor] = []  # the last one was freed last
        self._lock = threading.RLock()  # the collector may free a tensor inside

    @property
    def idle_bytes(self) -> int:
        """How many bytes are kept that no tensor has."""
        with self._lock:
            return sum(each.nbytes for each in self._idle)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a tensor on the CPU with any values. Its memory comes back when no view of it is left."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes < _MIN_BYTES:
            return torch.empty(shape, dtype=dtype)
        memory = self._take(num_bytes)
        lent = memory.numpy()[:num_bytes]  # lives as long as the tensor's storage
        weakref.finalize(lent, self._give_back, memory).atexit = False
        return torch.from_numpy(lent).view(dtype).view(tuple(shape))

    def _take(self, num_bytes: int) -> Tensor:
        """Return the smallest memory that is large enough, unless most of it would lie idle; or else new memory."""
        with self._lock:
            fits = [
                (each.nbytes, index)
                for index, each in enumerate(self._idle)
                if num_bytes <= each.nbytes <= _MOST_TIMES * num_bytes
            ]
            if fits:
                return self._idle.pop(min(fits)[1])
        return torch.empty(num_bytes, dtype=torch.uint8)

    def _give_back(self, memory: Tensor) -> None:
        """Keep memory for the next tensor, and let the oldest go where it is too much."""
        with self._lock:
            self._idle.append(memory)
            while self.idle_bytes > self._max_idle_bytes:
                self._idle.pop(0)
