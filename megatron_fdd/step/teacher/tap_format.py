"""The format in which the teacher's taps wait for the student and travel between stages: unchanged, FP8 or int8.

Shapes: [..., T], T the teacher's width; live taps are [S, B, T], S sequence (this rank's part), B micro-batch. In names
R stands for all dimensions before T, K for the kept entries of a token, P for the width of a packed token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from megatron_fdd.data.store.identity import TapForm

_FP8 = torch.float8_e4m3fn
_LARGEST_FP8 = torch.finfo(_FP8).max
_LARGEST_INT8 = 127
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny
_SCALE_BYTES = 4
_NUM_KEPT = 8
_KEPT_BYTES = 2 * _NUM_KEPT  # of their positions, and of their values
_RECORD_BYTES = 16  # an int8 record is a multiple of it
_WIDTHS = range(_NUM_KEPT, 2**16)  # of an int8 record


@dataclass(frozen=True, slots=True)
class TapFormat:
    """The packing of a tap into one tensor and back, in plain torch: for any device, and any backend that moves bytes.

    - `float32`, `bf16`: unchanged, in `dtype`.
    - `fp8`: e4m3 with one float32 scale for each token, which maps the token's largest entry onto the largest number of
      the format: T + 4 bytes a token. Entries down to 3.5e-5 of their token's largest keep a relative precision of
      1/16, so that the few huge entries of a hidden state do not drown the others.
    - `int8`: the 8 largest entries of a token, by magnitude, are kept in bf16; the others are whole multiples of one
      float32 scale, 1/127 of the largest among them, so that none is off by more than half a scale. A token's record:
      T values in int8 (0 where an entry is kept), the scale, 8 positions in uint16, 8 values in bf16, and zeros up to
      a multiple of 16 bytes. T is from 8 to 65,535. A bf16 tap that was packed and unpacked once stays the same.

    A token with an entry that is not finite becomes NaN; packed in int8 also one with an entry too large for bf16.

    Attributes:
        dtype: dtype of the teacher's hidden states.
        form: how they are packed.
    """

    dtype: torch.dtype
    form: TapForm

    @property
    def is_identity(self) -> bool:
        """Whether a packed tap is the tap itself."""
        return self.form not in ("fp8", "int8")

    @property
    def packed_dtype(self) -> torch.dtype:
        """The dtype of a packed tap."""
        return self.dtype if self.is_identity else torch.uint8

    def packed_width(self, width: int) -> int:
        """Return the number of entries of a packed token whose tap has `width`."""
        if self.form == "int8":
            size = sum(_int8_sizes(width))
            return size + -size % _RECORD_BYTES
        return width + _SCALE_BYTES if self.form == "fp8" else width

    def token_bytes(self, width: int) -> int:
        """Return the bytes of a token's packed tap of `width`."""
        return self.packed_width(width) * self.packed_dtype.itemsize

    def check_width(self, width: int, source: str) -> None:
        """Refuse a width that this form has no room for.

        Args:
            source: the flag or file that chose the form.

        Raises:
            ValueError: names the width, the bounds and the remedy.
        """
        if self.form == "int8" and width not in _WIDTHS:
            raise ValueError(
                f"{source}: the teacher's hidden states are {width} wide, and int8 keeps {_NUM_KEPT} entries of a "
                f"token with their positions in 16 bits: a width from {_WIDTHS[0]} to {_WIDTHS[-1]}; use bf16"
            )

    def pack(self, tap_RT: Tensor) -> Tensor:
        """Pack a tap [..., T] into [..., packed_width(T)] of `packed_dtype`."""
        if self.form == "int8":
            return _pack_int8(tap_RT)
        return _pack_fp8(tap_RT) if self.form == "fp8" else tap_RT

    def unpack(self, packed_RP: Tensor, width: int) -> Tensor:
        """Return the tap, [..., T] of `dtype`; T is `width`, which the padding of a record hides."""
        if self.form == "int8":
            return _unpack_int8(packed_RP, width).to(self.dtype)
        return _unpack_fp8(packed_RP).to(self.dtype) if self.form == "fp8" else packed_RP


def _pack_fp8(tap_RT: Tensor) -> Tensor:
    largest_R1 = tap_RT.abs().amax(-1, keepdim=True).float()
    scale_R1 = (largest_R1 / _LARGEST_FP8).clamp(min=_SMALLEST_SCALE)
    values_RT = (tap_RT.float() / scale_R1).to(_FP8)
    return torch.cat([values_RT.view(torch.uint8), scale_R1.view(torch.uint8)], dim=-1)


def _unpack_fp8(packed_RP: Tensor) -> Tensor:
    values_RT = packed_RP[..., :-_SCALE_BYTES].view(_FP8)
    return values_RT.float() * _from_bytes(packed_RP[..., -_SCALE_BYTES:], torch.float32)


def _pack_int8(tap_RT: Tensor) -> Tensor:
    positions_RK = tap_RT.abs().topk(_NUM_KEPT).indices
    kept_RK = tap_RT.gather(-1, positions_RK).bfloat16()
    # Entries that are not finite count as the largest.
    is_finite_R1 = kept_RK.isfinite().all(-1, keepdim=True)
    rest_RT = tap_RT.float().scatter(-1, positions_RK, 0.0)
    scale_R1 = (rest_RT.abs().amax(-1, keepdim=True) / _LARGEST_INT8).clamp(min=_SMALLEST_SCALE)
    values_RT = rest_RT.div_(scale_R1).round_().to(torch.int8)
    scale_R1 = scale_R1.where(is_finite_R1, torch.nan)
    kept_RK = kept_RK.where(is_finite_R1, torch.nan)
    parts = (values_RT, scale_R1, positions_RK.to(torch.uint16), kept_RK)
    record_RP = torch.cat([part.view(torch.uint8) for part in parts], dim=-1)
    return pad(record_RP, (0, -record_RP.shape[-1] % _RECORD_BYTES))


def _unpack_int8(packed_RP: Tensor, width: int) -> Tensor:
    sizes = _int8_sizes(width)
    values, scale, positions, kept = packed_RP[..., : sum(sizes)].split(sizes, dim=-1)
    tap_RT = values.view(torch.int8).float() * _from_bytes(scale, torch.float32)
    positions_RK = _from_bytes(positions, torch.uint16).long()
    return tap_RT.scatter_(-1, positions_RK, _from_bytes(kept, torch.bfloat16).float())


def _int8_sizes(width: int) -> list[int]:
    """Return the bytes of a record's parts: values, scale, positions and values of the kept entries."""
    return [width, _SCALE_BYTES, _KEPT_BYTES, _KEPT_BYTES]


def _from_bytes(part: Tensor, dtype: torch.dtype) -> Tensor:
    """Read a part of a record as `dtype`; the copy begins at an address that is aligned for it, whatever the width."""
    return part.clone(memory_format=torch.contiguous_format).view(dtype)
