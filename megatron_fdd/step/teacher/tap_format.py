"""How the teacher's taps wait for the student and travel between stages: as they are, or in FP8.

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
    """Packs a tap into one tensor and back. Plain torch: any device, any backend that moves bytes.

    FP8 is e4m3 with one float32 scale a token, which maps the token's largest entry onto the largest number of
    the format: T + 4 bytes a token. An entry keeps a relative precision of 1/16 down to 3.5e-5 of its token's
    largest, so that the few huge entries of a hidden state do not drown the others. A token that is not finite
    is NaN afterwards.

    Attributes:
        dtype: of the teacher's hidden states.
        is_fp8: False leaves taps as they are.
    """

    dtype: torch.dtype
    is_fp8: bool

    @property
    def packed_dtype(self) -> torch.dtype:
        return torch.uint8 if self.is_fp8 else self.dtype

    def packed_width(self, width: int) -> int:
        """Entries of a packed token whose tap has `width`."""
        return width + _SCALE_BYTES if self.is_fp8 else width

    def token_bytes(self, width: int) -> int:
        """What a token's tap of `width` takes."""
        return self.packed_width(width) * self.packed_dtype.itemsize

    def pack(self, tap_SBT: Tensor) -> Tensor:
        """[S, B, packed_width(T)] of `packed_dtype`."""
        if not self.is_fp8:
            return tap_SBT
        largest_SB1 = tap_SBT.abs().amax(-1, keepdim=True).float()
        scale_SB1 = (largest_SB1 / _LARGEST).clamp(min=torch.finfo(torch.float32).tiny)
        values_SBT = (tap_SBT.float() / scale_SB1).to(_FP8)
        return torch.cat([values_SBT.view(torch.uint8), scale_SB1.view(torch.uint8)], dim=-1)

    def unpack(self, packed: Tensor) -> Tensor:
        """The tap, [S, B, T] of `dtype`."""
        if not self.is_fp8:
            return packed
        values_SBT = packed[..., :-_SCALE_BYTES].view(_FP8)
        # A copy begins at an address that float32 may have, whatever the width.
        bytes_SB4 = packed[..., -_SCALE_BYTES:].clone(memory_format=torch.contiguous_format)
        scale_SB1 = bytes_SB4.view(torch.float32)
        return (values_SBT.float() * scale_SB1).to(self.dtype)
