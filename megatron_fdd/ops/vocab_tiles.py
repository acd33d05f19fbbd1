"""Logits of teacher and student, one tile of the vocabulary at a time.

Shapes: R tokens, M rows = R per model (teacher's first, student's last), C columns of a tile,
T / D hidden width of teacher / student, W rows of the head shard.

Products run in the weights' dtype with float32 results; everything else is float32 (float64 stays float64).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_fdd.ops.head_extras import NO_EXTRAS, HeadExtras

# Elementwise formulas with temporaries run on this fraction of a tile's rows, which saves memory. On a CPU they also
# run on at most so many numbers (512 KiB), which stay in the cache.
ROW_BLOCKS = 8
BLOCK_SIZE = 2**17
# Rows of logits begin this many numbers apart, or a multiple of it. GPUs read and write 16 bytes at a time only where
# every row begins at such a multiple, and so do the fast kernels of cuBLAS; a vocabulary may have any size.
ROW_ALIGNMENT = 64


def statistics_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype of logits, exponentials and sums."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def product_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype in which products read their operands.

    Only CUDA multiplies half-precision numbers into float32; elsewhere the operands are widened, tile by
    tile, because a logit rounded to bf16 is off by up to 0.2 percent of itself.
    """
    half = tensor.dtype in (torch.bfloat16, torch.float16)
    return tensor.dtype if half and tensor.is_cuda else statistics_dtype(tensor)


def multiply(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Write left @ right to `out`, for operands in `product_dtype`."""
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    else:
        torch.mm(left, right, out_dtype=out.dtype, out=out)


def product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Return left @ right in `dtype`, the statistics' dtype; operands have the dtype of `right`, a `product_dtype`."""
    if right.dtype == dtype:
        return left @ right
    return torch.mm(left.to(right.dtype), right, out_dtype=dtype)


def accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add product(left, right) to `total`."""
    if right.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        torch.addmm(total, left.to(right.dtype), right, out_dtype=total.dtype, out=total)


def row_stride(num_columns: int) -> int:
    """Return how many numbers apart rows of so many columns begin."""
    return -(-num_columns // ROW_ALIGNMENT) * ROW_ALIGNMENT


def empty_rows(num_rows: int, num_columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Make rows that are `row_stride` apart, [num_rows, num_columns]; the memory between them is theirs too."""
    return torch.empty(num_rows, row_stride(num_columns), dtype=dtype, device=device)[:, :num_columns]


def row_blocks(tile_RC: Tensor) -> Iterator[slice]:
    """Yield a tile's rows in pieces."""
    num_rows, width = tile_RC.shape
    size = -(-num_rows // ROW_BLOCKS)
    if not tile_RC.is_cuda:
        size = min(size, BLOCK_SIZE // width)
    size = max(1, size)
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


class Tile(NamedTuple):
    """Some columns of the vocabulary. The tensors may be overwritten; the next tile reuses them."""

    columns: slice
    teacher_RC: Tensor | None  # logits / temperature
    student_RC: Tensor
    logits_MC: Tensor  # both of them, one buffer; rows are `row_stride` numbers apart
    head_CD: Tensor  # the student's rows, in `product_dtype`


class LogitTiles:
    """The tiles of this rank's vocabulary, for any number of passes; each pass has two [R, tile] buffers."""

    def __init__(
        self,
        teacher: tuple[Tensor, Tensor] | None,
        student: tuple[Tensor, Tensor],
        *,
        num_valid: int,
        tile_size: int,
        temperature: float,
        extras: tuple[HeadExtras, HeadExtras] = (NO_EXTRAS, NO_EXTRAS),
    ) -> None:
        """Take hidden states [R, width] and head [W, width] of `teacher` and `student`, and `extras` of both."""
        self.models = [student] if teacher is None else [teacher, student]
        self.hiddens = [hidden.to(product_dtype(head)) for hidden, head in self.models]
        self.num_valid, self.temperature = num_valid, temperature
        self._extras = extras[1:] if teacher is None else extras
        self.tile_size = max(1, min(tile_size, num_valid))
        hidden = student[0]
        self.num_tokens = len(hidden)
        self.dtype = statistics_dtype(hidden)
        self.device = hidden.device

    def __iter__(self) -> Iterator[Tile]:
        rows = self.num_tokens
        num_rows = len(self.models) * rows
        buffer = torch.empty(num_rows * row_stride(self.tile_size), dtype=self.dtype, device=self.device)
        for start in range(0, self.num_valid, self.tile_size):
            columns = slice(start, min(start + self.tile_size, self.num_valid))
            width = columns.stop - start
            stride = row_stride(width)
            logits_MC = buffer[: num_rows * stride].view(num_rows, stride)[:, :width]
            heads = [head[columns].to(product_dtype(head)) for _, head in self.models]
            parts = [logits_MC[i * rows : (i + 1) * rows] for i in range(len(heads))]
            for hidden, head, part in zip(self.hiddens, heads, parts, strict=True):
                multiply(hidden, head.T, part)
            for extras, part in zip(self._extras, parts, strict=True):
                extras.apply(part, columns)
            if self.temperature != 1.0:
                logits_MC.mul_(1 / self.temperature)
            teacher_RC = parts[0] if len(parts) == 2 else None
            yield Tile(columns, teacher_RC, parts[-1], logits_MC, heads[-1])

    def zeros(self, *shape: int) -> Tensor:
        """Return zeros in the statistics' dtype, on the device of the hidden states."""
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    @property
    def student_width(self) -> int:
        """Columns of the student's head."""
        return self.models[-1][0].shape[-1]
