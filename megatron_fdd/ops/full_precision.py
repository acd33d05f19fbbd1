"""Float32 products in float32, whatever the user lets other products be rounded to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """Within it, or within a function that it decorates, float32 operands are not rounded to TF32 or bf16.

    Torch keeps that choice for the whole process and in two interfaces, which must agree wherever one of them is
    read: both are set here and restored as they were. A product is launched with the choice of that moment, so
    later ones are the user's again. No host synchronisation.
    """
    chosen = [backend.fp32_precision for backend in _backends()]
    for backend in _backends():
        backend.fp32_precision = "ieee"
    # Only now is the older setting sure to be readable: torch refuses while the two contradict each other.
    level = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(level)
        for backend, precision in zip(_backends(), chosen, strict=True):
            backend.fp32_precision = precision


def _backends() -> list[Any]:
    """Where the newer interface keeps it; torch 2.8 has the older one alone."""
    places = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    return [place for place in places if hasattr(place, "fp32_precision")]
