"""MXFP4, as gpt-oss publishes its experts: numbers of four bits, and a power of two for each 32 of them.

`NAME_blocks` holds two numbers in a byte, the first one in the lower half; `NAME_scales` has exponents, shifted by 127.
The format is in the Microscaling specification of the Open Compute Project. All values are exact in bfloat16.

Shapes: ... experts (absent in a slice), R rows, G groups of 32 inputs; the value lies the other way, [..., 32 G, R].
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_fdd.convert.families.family import refuse_field
from megatron_fdd.convert.quantised import FIELD, VALUES, Quantised
from megatron_fdd.convert.stored_tensor import StoredTensor
from megatron_fdd.host.field_kinds import FLAG, TEXT, list_of, optional, shown

_BLOCKS, _SCALES = "_blocks", "_scales"
_BYTES = 16
_BIAS = 127
# So many numbers are worked on at a time, in memory that is used again: fewer cost more calls, more leave the cache.
_AT_ONCE = 1 << 20
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# `modules_to_not_convert` names modules that are not quantised: the files show which are.
_FIELDS = {
    "quant_method": TEXT,
    "modules_to_not_convert": optional(list_of(TEXT)),
    "dequantize": optional(FLAG),
}


class MicroscaledFp4:
    """See `Dequantiser`."""

    def check(self, settings: Mapping[str, Any]) -> None:
        """See `Dequantiser`."""
        for field, value in settings.items():
            if field not in _FIELDS:
                refuse_field(f"{FIELD}.{field}", value, "which is not understood")
            if not _FIELDS[field].fits(value):
                refuse_field(f"{FIELD}.{field}", value, f"which must be {_FIELDS[field].words}")

    def find(self, tensors: Mapping[str, StoredTensor], _settings: Mapping[str, Any]) -> dict[str, Quantised]:
        """See `Dequantiser`."""
        found = {}
        for blocks, stored in tensors.items():
            name = blocks.removesuffix(_BLOCKS)
            if name == blocks:
                continue
            if name in tensors:
                raise ValueError(f"{name} is there twice, by itself and as {blocks}; copy the model again")
            _check(name, stored, tensors.get(name + _SCALES))
            *outer, rows, groups, width = stored.shape
            found[name] = Quantised(
                parts=(blocks, name + _SCALES),
                shape=(*outer, 2 * groups * width, rows),
                dtype=torch.bfloat16,
                value=_value,
                codes=_codes,
            )
        alone = [
            name for name in tensors if name.endswith(_SCALES) and name.removesuffix(_SCALES) not in found
        ]
        if alone:
            raise ValueError(f"{alone[0]} scales nothing: its {_BLOCKS} are missing; copy the model again")
        return found


def _check(name: str, blocks: StoredTensor, scales: StoredTensor | None) -> None:
    """Refuse blocks without scales, or of another form."""
    if scales is None:
        raise ValueError(f"{name}{_BLOCKS} has no {name}{_SCALES}; copy the model again")
    is_right = blocks.dtype == scales.dtype == "U8" and blocks.shape == (*scales.shape, _BYTES)
    if not is_right or len(scales.shape) < 2:
        raise ValueError(
            f"{name}{_BLOCKS} is {blocks.dtype} {shown(list(blocks.shape))} and {_SCALES} {scales.dtype} "
            f"{shown(list(scales.shape))}: MXFP4 has U8, {_BYTES} bytes for each scale; copy the model again"
        )


def _value(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return the values [..., 32 G, R] of blocks [..., R, G, 16] and scales [..., R, G]."""
    blocks, scales = parts
    *outer, groups = scales.shape
    value = VALUES.empty((*outer, groups, 2 * _BYTES), dtype)
    step = max(1, _AT_ONCE // (2 * _BYTES))
    index = torch.empty(step * _BYTES // 2, dtype=torch.int32)
    fours = torch.empty(step * _BYTES // 2, dtype=torch.int64)
    each = (blocks.view(-1, _BYTES), scales.view(-1), value.view(-1, 2 * _BYTES))
    for some, exponents, written in zip(*(tensor.split(step) for tensor in each), strict=True):
        count = some.numel() // 2
        index[:count].copy_(some.view(torch.int16).flatten()).bitwise_and_(0xFFFF)
        torch.index_select(_fours(), 0, index[:count], out=fours[:count])
        # The exponents of bfloat16 have the same bias; its smallest power of two is subnormal.
        powers = exponents.to(torch.int16).bitwise_left_shift_(7).masked_fill_(exponents == 0, 1 << 6)
        numbers = fours[:count].view(torch.bfloat16).view(-1, 2 * _BYTES)
        written.copy_(numbers.mul_(powers.view(torch.bfloat16).unsqueeze(-1)))
    return value.flatten(-2).transpose(-1, -2)


@functools.cache
def _fours() -> Tensor:
    """Return the four numbers of each two bytes, as four bfloat16 in an int64 [65536]: a look-up is a memory access."""
    numbers = torch.tensor([*_MAGNITUDES, *(-each for each in _MAGNITUDES)], dtype=torch.bfloat16)
    codes = torch.arange(1 << 16)
    return torch.stack([numbers[codes >> shift & 15] for shift in (0, 4, 8, 12)], dim=-1).view(torch.int64)[
        :, 0
    ]


def _codes(value: Tensor, others: Sequence[Tensor]) -> Tensor:
    """Return the blocks of a value with known scales."""
    (scales,) = others
    groups = value.transpose(-1, -2).unflatten(-1, (scales.shape[-1], 2 * _BYTES)).float()
    plain = torch.ldexp(groups, _BIAS - scales.int().unsqueeze(-1))
    codes = torch.searchsorted(torch.tensor(_MAGNITUDES), plain.abs().contiguous())
    codes = (codes + 8 * plain.signbit()).to(torch.uint8).unflatten(-1, (_BYTES, 2))
    return codes[..., 0] | codes[..., 1] << 4
