"""Bytes of a file as a tensor, without a copy."""

from __future__ import annotations

import mmap
from pathlib import Path

import torch
from torch import Tensor


def mapped(path: Path, offset: int, num_bytes: int) -> Tensor:
    """Return a part of a file as bytes on the CPU, which are mapped; its pages leave memory together with it.

    The system begins to read them at once.

    Raises:
        ValueError: the file ends before.
    """
    if num_bytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    start = offset - offset % mmap.ALLOCATIONGRANULARITY
    with path.open("rb") as file:
        # Copy-on-write mode, so that torch accepts the array; nothing writes to it.
        pages = mmap.mmap(file.fileno(), offset + num_bytes - start, access=mmap.ACCESS_COPY, offset=start)
    pages.madvise(mmap.MADV_WILLNEED)
    return torch.frombuffer(pages, dtype=torch.uint8, offset=offset - start)
