"""How the Triton kernels cut their work, and a launch as a value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Blocks:
    """How a product is cut: a program makes [rows, columns], `depth` at a time, `group` row blocks together."""

    rows: int
    columns: int
    depth: int
    group: int
    warps: int
    stages: int

    @property
    def sizes(self) -> dict[str, int]:
        """As a kernel's arguments."""
        return {"ROWS": self.rows, "COLUMNS": self.columns, "DEPTH": self.depth, "GROUP": self.group}


@dataclass(frozen=True, slots=True)
class Cut:
    """The blocks of the two products: hidden states by head (both models at once), and weights by head."""

    logits: Blocks
    sums: Blocks

    def __post_init__(self) -> None:
        assert self.logits.columns % self.sums.depth == 0, f"{self.logits} and {self.sums}"


# For Hopper; chosen by what the compiler reports (registers, shared memory) ahead of time: see gpu/report.py.
HALF_CUT = Cut(Blocks(128, 128, 64, 16, 8, 4), Blocks(128, 256, 64, 16, 8, 3))
# Without tensor cores: their float32 products are not float32.
SINGLE_CUT = Cut(Blocks(64, 64, 32, 16, 8, 2), Blocks(64, 64, 32, 16, 8, 2))


def cut_for(dtype: torch.dtype) -> Cut:
    """The blocks for heads of this dtype."""
    return SINGLE_CUT if dtype == torch.float32 else HALF_CUT


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel with all that it needs to run, or to be compiled for a GPU that is not here."""

    kernel: Any
    num_programs: int
    arguments: dict[str, Any]
    warps: int = 4
    stages: int = 1

    def run(self) -> None:
        """Enqueue it on the current stream."""
        self.kernel[(self.num_programs,)](**self.arguments, num_warps=self.warps, num_stages=self.stages)


def must_widen(head: Tensor) -> bool:
    """Triton's interpreter multiplies the bit patterns of bf16 numbers."""
    return head.device.type == "cpu" and head.dtype != torch.float32
