"""The extension's types, and numbers of eight bits."""

from __future__ import annotations

import enum

import torch
from torch import Tensor


class DType(enum.IntEnum):
    kByte = 0  # noqa: N815
    kInt32 = 2
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat4E2M1 = 10


TORCH_TYPES = {
    DType.kByte: torch.uint8,
    DType.kInt32: torch.int32,
    DType.kFloat32: torch.float32,
    DType.kFloat16: torch.float16,
    DType.kBFloat16: torch.bfloat16,
    DType.kFloat8E4M3: torch.float8_e4m3fn,
    DType.kFloat8E5M2: torch.float8_e5m2,
}


def torch_type(dtype: int) -> torch.dtype:
    return TORCH_TYPES[DType(int(dtype))]


def cast(scaled: Tensor, fp8: torch.dtype) -> Tensor:
    """Cast to FP8 with saturation, as bytes."""
    largest = torch.finfo(fp8).max
    return scaled.detach().float().clamp(-largest, largest).to(fp8).view(torch.uint8).contiguous()
