"""Exact transport of float32 numbers, and of their gradient, in a tensor of a narrower dtype.

A pipeline sends tensors of one dtype. A log-sum-exp that travels in it must not be rounded: rounding to bf16 costs
6.5e-2 in the delta's cosine (docs/gradients.md). It therefore travels as three numbers of that dtype whose scaled sum
is exact, and so does its gradient on the way back.

Shapes: M float32 numbers, R rows of width D that hold them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_PARTS = 3  # bf16 has 3 x 8 bits, fp16 3 x 11: at least the 24 of float32


def rows_needed(count: int, width: int, dtype: torch.dtype) -> int:
    """Return how many rows of `width` numbers `count` float32 numbers fill."""
    parts = 1 if dtype == torch.float32 else _PARTS
    return -(-count * parts // width)


def to_rows(value_M: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Write [M] float32 as [R, D] of `dtype`, filled up with zeros. The gradient comes back exactly."""
    return _ToRows.apply(value_M, width, dtype)


def from_rows(rows_RD: Tensor, count: int) -> Tensor:
    """Read [count] float32 from [R, D]: the inverse of `to_rows`."""
    return _FromRows.apply(rows_RD, count)


class _ToRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value_M: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        ctx.count = len(value_M)
        return _split(value_M, width, dtype)

    @staticmethod
    def backward(ctx: Any, gradient_RD: Tensor) -> tuple[Tensor | None, ...]:
        return _join(gradient_RD, ctx.count), None, None


class _FromRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, count: int) -> Tensor:
        ctx.width, ctx.dtype = rows_RD.shape[1], rows_RD.dtype
        return _join(rows_RD, count)

    @staticmethod
    def backward(ctx: Any, gradient_M: Tensor) -> tuple[Tensor | None, ...]:
        return _split(gradient_M, ctx.width, ctx.dtype), None


def _split(value_M: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    value_M = value_M.float()
    if dtype == torch.float32:
        parts = value_M
    else:
        pieces, rest = [], value_M
        for _ in range(_PARTS):
            pieces.append(rest.to(dtype))
            # Scaled up, so that the rest stays far above the smallest number of the dtype.
            rest = (rest - pieces[-1].float()) * _scale(dtype)
        parts = torch.cat(pieces)
    rows_RD = parts.new_zeros(rows_needed(len(value_M), width, dtype) * width)
    rows_RD[: len(parts)] = parts
    return rows_RD.view(-1, width)


def _join(rows_RD: Tensor, count: int) -> Tensor:
    flat = rows_RD.flatten().float()
    if rows_RD.dtype == torch.float32:
        return flat[:count].clone()
    pieces = flat[: _PARTS * count].view(_PARTS, count)
    scale = _scale(rows_RD.dtype)
    return pieces[0] + (pieces[1] + pieces[2] / scale) / scale


def _scale(dtype: torch.dtype) -> float:
    """Return 2 ** (bits of the mantissa): multiplying by it is exact."""
    return 2.0 / torch.finfo(dtype).eps
