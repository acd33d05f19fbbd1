"""FP8 in blocks, as DeepSeek and Qwen publish it: a matrix of codes, and a scale for each block of 128 x 128.

`NAME` is stored as float8_e4m3fn, and `NAME_scale_inv` has one number for each block, by which the codes are
multiplied. The last row and column of blocks may be cut short: DeepSeek-V3 has a matrix of 576 rows and 5 rows of
scales, which transformers 5.23 refuses.

Shapes: R rows and C columns of codes, r and c of scales.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_fdd.convert.families.family import refuse_field
from megatron_fdd.convert.quantised import FIELD, VALUES, Quantised
from megatron_fdd.convert.stored_tensor import StoredTensor
from megatron_fdd.host.field_kinds import FLAG, TEXT, Kind, list_of, optional, shown, whole

_SCALE = "_scale_inv"
_CODES = "F8_E4M3"
# U8 and F8_E8M0 are powers of two.
_SCALES = ("F32", "BF16", "F16", "U8", "F8_E8M0")
# Fields of quantization_config, with the values that are understood, or what they may be.
_FIELDS: Mapping[str, tuple[Any, ...] | Kind] = {
    "quant_method": ("fp8",),
    "fmt": ("e4m3", "float8_e4m3fn"),
    "activation_scheme": ("dynamic",),  # it concerns a program that multiplies in FP8
    "weight_block_size": optional(list_of(whole(1, 1 << 20))),
    "scale_fmt": ("float", "ue8m0", None),
    "expert_dtype": ("fp8",),
    "dequantize": optional(FLAG),
    # Modules that are not quantised: the files show which are.
    **dict.fromkeys(("modules_to_not_convert", "ignored_layers"), optional(list_of(TEXT))),
}
_BLOCK = 128
# float8_e4m3fn in float16: how far its mantissa is shifted, the bits that it has there (0xBF80), and the biases of both
# exponents.
_MANTISSA_SHIFT, _FLOAT16_BITS, _BIASES = 7, -0x4080, 2.0 ** (15 - 7)
# The one magnitude that is no number.
_NAN = 0x7F
# Between them no product of a scale and a code is rounded to 0 or to infinity.
_LEAST, _MOST = 2.0**-117, 2.0**117
# So many codes are worked on at a time, in memory that is used again: fewer cost more calls, more leave the cache.
_AT_ONCE = 1 << 20


class BlockFp8:
    """See `Dequantiser`."""

    def check(self, settings: Mapping[str, Any]) -> None:
        """See `Dequantiser`."""
        for field, value in settings.items():
            allowed = _FIELDS.get(field, ())
            if isinstance(allowed, Kind):
                if not allowed.fits(value):
                    refuse_field(f"{FIELD}.{field}", value, f"which must be {allowed.words}")
            elif value not in allowed:
                only = (
                    f"only {', '.join(map(repr, allowed))} is read" if allowed else "which is not understood"
                )
                refuse_field(f"{FIELD}.{field}", value, only)
        _block(settings)

    def find(self, tensors: Mapping[str, StoredTensor], settings: Mapping[str, Any]) -> dict[str, Quantised]:
        """See `Dequantiser`."""
        block = _block(settings)
        found = {}
        for name, codes in tensors.items():
            scale = f"{name}{_SCALE}"
            if codes.dtype != _CODES:
                if scale in tensors:
                    raise ValueError(
                        f"{name} is stored as {codes.dtype} and has {scale}; copy the model again"
                    )
                continue
            if scale not in tensors:
                raise ValueError(f"{name} is stored in FP8 and has no {scale}; copy the model again")
            _check(name, codes, tensors[scale], block)
            found[name] = Quantised(
                parts=(name, scale),
                shape=codes.shape,
                dtype=torch.bfloat16,
                value=partial(_value, name, block),
                codes=partial(_codes, block),
            )
        alone = [name for name in tensors if name.endswith(_SCALE) and name.removesuffix(_SCALE) not in found]
        if alone:
            raise ValueError(
                f"{alone[0]} scales nothing: its matrix is not there in FP8; copy the model again"
            )
        return found


def _block(settings: Mapping[str, Any]) -> tuple[int, int]:
    """Return the rows and columns of a block."""
    block = settings.get("weight_block_size") or [_BLOCK, _BLOCK]
    if not (isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
        refuse_field(f"{FIELD}.weight_block_size", block, "which must be two whole numbers above 0")
    return block[0], block[1]


def _check(name: str, codes: StoredTensor, scales: StoredTensor, block: tuple[int, int]) -> None:
    """Refuse scales of a kind or a number that does not fit the codes."""
    if scales.dtype not in _SCALES:
        raise ValueError(f"{name}{_SCALE} is stored as {scales.dtype}; only {', '.join(_SCALES)} are read")
    expected = tuple(-(-size // part) for size, part in zip(codes.shape, block, strict=False))
    if len(codes.shape) != 2 or scales.shape != expected:
        raise ValueError(
            f"{name}{_SCALE} has the shape {shown(list(scales.shape))}, and {name} {shown(list(codes.shape))}: blocks "
            f"of {block[0]} x {block[1]} need {shown(list(expected))}; copy the model again"
        )


def _check_scales(name: str, block: tuple[int, int], codes_RC: Tensor, scales_rc: Tensor) -> None:
    """Refuse scales with which codes would lose their value; those of blocks of nothing but 0 may be 0."""
    for row, column in (~((scales_rc >= _LEAST) & (scales_rc <= _MOST))).nonzero().tolist():
        scale = float(scales_rc[row, column])
        rows, columns = (
            slice(at * size, (at + 1) * size) for at, size in zip((row, column), block, strict=True)
        )
        if not 0 <= scale < _LEAST or bool(codes_RC[rows, columns].view(torch.uint8).bitwise_and(_NAN).any()):
            raise ValueError(
                f"{name}{_SCALE} has {scale:g} for block ({row}, {column}): a scale must lie between 2^-117 and 2^117; "
                "copy the model again"
            )


def _value(name: str, block: tuple[int, int], parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return codes [R, C] times scales [r, c], multiplied in float32 and rounded once, as transformers does."""
    codes_RC, scales_rc = parts[0], _float32_scales(parts[1])
    _check_scales(name, block, codes_RC, scales_rc)
    value_RC = VALUES.empty(codes_RC.shape, dtype)
    bands = _bands(block, scales_rc, codes_RC.shape)
    most = max((codes_RC[rows].numel() for rows, _ in bands), default=0)
    bits, number = torch.empty(most, dtype=torch.int16), torch.empty(most)
    for rows, scale_1C in bands:
        value_RC[rows] = _float32(codes_RC[rows], bits, number).mul_(scale_1C)
    return value_RC


def _float32(codes: Tensor, bits: Tensor, number: Tensor) -> Tensor:
    """Return codes as float32, exactly. torch's own conversion takes ten times as long.

    Args:
        bits, number: memory for as many int16 and float32, which is written to; the result is a view of `number`.
    """
    raw, count = codes.view(torch.int8), codes.numel()
    # Sign, four bits of exponent, three of mantissa, in the places that float16 has for them; subnormal numbers too.
    bits = (
        bits[:count]
        .view(raw.shape)
        .copy_(raw)
        .bitwise_left_shift_(_MANTISSA_SHIFT)
        .bitwise_and_(_FLOAT16_BITS)
    )
    value = number[:count].view(raw.shape).copy_(bits.view(torch.float16)).mul_(_BIASES)
    magnitude = raw.bitwise_and(_NAN)
    if count and int(magnitude.amax()) == _NAN:
        value[magnitude == _NAN] = torch.nan
    return value


def _codes(block: tuple[int, int], value_RC: Tensor, others: Sequence[Tensor]) -> Tensor:
    """Return the codes of a value with known scales."""
    scales_rc = _float32_scales(others[0])
    scales_rc = scales_rc.masked_fill(scales_rc < _LEAST, 1)  # their codes are 0 or -0
    codes_RC = torch.empty(value_RC.shape, dtype=torch.float8_e4m3fn)
    for rows, scale_1C in _bands(block, scales_rc, value_RC.shape):
        codes_RC[rows] = (value_RC[rows].float() / scale_1C).to(codes_RC.dtype)
    return codes_RC


def _float32_scales(scales_rc: Tensor) -> Tensor:
    """Return scales of any kind that is read as float32."""
    return (scales_rc.view(torch.float8_e8m0fnu) if scales_rc.dtype == torch.uint8 else scales_rc).float()


def _bands(block: tuple[int, int], scales_rc: Tensor, shape: Sequence[int]) -> list[tuple[slice, Tensor]]:
    """Return some rows at a time, none of two blocks, with their scales, [1, C]."""
    num_rows, num_columns = shape
    wide_rC = scales_rc.repeat_interleave(block[1], dim=1)[:, :num_columns]
    step = max(1, _AT_ONCE // max(num_columns, 1))
    return [
        (slice(start, min(start + step, end)), scale_1C)
        for first, scale_1C in zip(range(0, num_rows, block[0]), wide_rC.split(1), strict=True)
        for end in (min(first + block[0], num_rows),)
        for start in range(first, end, step)
    ]
