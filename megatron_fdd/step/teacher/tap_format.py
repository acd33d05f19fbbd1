"""The format in which the teacher's taps wait for the student and travel between stages: unchanged, or FP8.

Shapes: S sequence (this rank's part), B micro-batch, T teacher's width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_FP8).max
_SCALE_BYTES = 4


@dataclass(frozen=True, slots=True)
class TapFormat:
    """The packing of a tap into one tensor and back, in plain torch: for any device, and any backend that moves bytes.

    FP8 is e4m3 with one float32 scale for each token, which maps the token's largest entry onto the largest number of
    the format: T + 4 bytes a token. Entries down to 3.5e-5 of their token's largest keep a relative precision of
    1/16, so that the few huge entries of a hidden state do not drown the others. A token with an entry that is not
    finite becomes NaN.

    Attributes:
        dtype: dtype of the teacher's hidden states.
        is_fp8: whether taps are packed in FP8; False leaves them unchanged.
    """

    dtype: torch.dtype
    is_fp8: bool

    @property
    def packed_dtype(self) -> torch.dtype:
        """The dtype of a packed tap."""
        return torch.uint8 if self.is_fp8 else self.dtype

    def packed_width(self, width: int) -> int:
        """Return the number of entries of a packed token whose tap has `width`."""
        return width + _SCALE_BYTES if self.is_fp8 else width

    def token_bytes(self, width: int) -> int:
        """Return the bytes of a token's packed tap of `width`."""
        return self.packed_width(width) * self.packed_dtype.itemsize

    def pack(self, tap_SBT: Tensor) -> Tensor:
        """Pack a tap [S, B, T] into [S, B, packed_width(T)] of `packed_dtype`."""
        if not self.is_fp8:
            return tap_SBT
        largest_SB1 = tap_SBT.abs().amax(-1, keepdim=True).float()
        scale_SB1 = (largest_SB1 / _LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
        values_SBT = (tap_SBT.float() / scale_SB1).to(_FP8)
        return torch.cat([values_SBT.view(torch.uint8), scale_SB1.view(torch.uint8)], dim=-1)

    def unpack(self, packed: Tensor) -> Tensor:
        """Return the tap, [S, B, T] of `dtype`."""
        if not self.is_fp8:
            return packed
        values_SBT = packed[..., :-_SCALE_BYTES].view(_FP8)
        # The copy begins at an address that is aligned for float32, whatever the width.
        bytes_SB4 = packed[..., -_SCALE_BYTES:].clone(memory_format=torch.contiguous_format)
        scale_SB1 = bytes_SB4.view(torch.float32)
        return (values_SBT.float() * scale_SB1).to(self.dtype)
