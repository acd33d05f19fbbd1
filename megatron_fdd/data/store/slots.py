"""Memory for batches of features that is used again and again, and that a loader's workers share with its process.

The first touch of new memory costs as much as reading into it, and that of new shared memory several times as much. A
slot is taken where a batch is read, and is free again when the last tensor of it is gone in the process that uses it.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import mmap
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_fdd.data.store.segment import Bytes

# Linux's MAP_NORESERVE, for which Python has no name: the system does not count what is never touched.
_NO_RESERVE = 0x4000
_numbers = itertools.count()
# All of this process. A worker sends the number of its own, which is a copy of one of these.
_slots: weakref.WeakValueDictionary[int, Slots] = weakref.WeakValueDictionary()

Shape = tuple[int, ...]


class Slots:
    """Equally large places for batches, made before the workers are forked. Untouched ones take no memory.

    Args:
        num_bytes: of a slot.
        num_workers: each has slots of its own; 0 where the loader's process reads.
        each: slots of a worker, or of the process.
    """

    def __init__(self, num_bytes: int, num_workers: int, each: int) -> None:
        self._each, count = each, max(1, num_workers) * each
        self._stride = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        # Anonymous, so that the size of /dev/shm is no limit.
        kind = mmap.MAP_SHARED if num_workers else mmap.MAP_PRIVATE
        self._memory = mmap.mmap(-1, count * self._stride + count, kind | mmap.MAP_ANONYMOUS | _NO_RESERVE)
        with contextlib.suppress(OSError):  # a kernel without huge pages
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._is_taken = np.frombuffer(self._memory, np.bool_, count, count * self._stride)
        self._number = next(_numbers)
        _slots[self._number] = self

    def take(self, worker: int, shape: Shape) -> Slot | None:
        """Take a slot of a worker for a batch; None if none is free, or the batch is larger."""
        first = worker * self._each
        if math.prod(shape) > self._stride:
            return None
        # The first free one, so that the others stay untouched.
        for number in range(first, first + self._each):
            if not self._is_taken[number]:
                self._is_taken[number] = True
                return Slot(self, number, shape)
        return None

    def array(self, number: int, shape: Shape) -> Bytes:
        """Return a slot's memory."""
        return np.ndarray(shape, np.uint8, self._memory, number * self._stride)

    def give_back(self, number: int) -> None:
        """Make a slot free."""
        self._is_taken[number] = False


class Slot:
    """A slot that is taken. Sent to the loader's process it arrives as a tensor.

    Attributes:
        array: its memory, uint8 of the batch's shape.
    """

    def __init__(self, slots: Slots, number: int, shape: Shape) -> None:
        self._slots, self._number, self._shape = slots, number, shape
        self.array = slots.array(number, shape)

    def tensor(self) -> Tensor:
        """Return a tensor of it; with the tensor and all its views the slot is given back."""
        array = self._slots.array(self._number, self._shape)
        weakref.finalize(array, self._slots.give_back, self._number).atexit = False
        return torch.from_numpy(array)

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrived, (self._slots._number, self._number, self._shape)


def _arrived(slots: int, number: int, shape: Shape) -> Tensor:
    return Slot(_slots[slots], number, shape).tensor()
