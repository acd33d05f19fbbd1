"""MXFP8 numbers in torch: one power of two for 32 values of a row, or in the second copy for 32 of a column.

Neither copy is transposed. A scale is one byte, its exponent biased by 127 (E8M0). TransformerEngine pads scales to
multiples of 128 and 4. Nothing here swizzles them for tensor cores; a tensor only claims to be swizzled.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.transformer_engine.dtypes import cast, torch_type

BLOCK, BIAS = 32, 127


def is_mx(tensor_or_quantizer: Any) -> bool:
    return type(tensor_or_quantizer).__name__.startswith("MXFP8")


def mx_blocks(tensor: Tensor, quantizer: Any) -> dict[str, Any]:
    """Return the parts of an MXFP8 tensor.

    Raises:
        ValueError: the shape is not a whole number of blocks, for either copy (TransformerEngine's quantizer.cpp).
    """
    rows = tensor.detach().float().reshape(-1, tensor.shape[-1])
    if any(size % BLOCK for size in rows.shape):
        raise ValueError(f"MXFP8 takes multiples of {BLOCK}, not {tuple(tensor.shape)}")
    assert not quantizer.with_2d_quantization
    fields: dict[str, Any] = {"with_gemm_swizzled_scales": quantizer.optimize_for_gemm}
    for way, wanted in (("rowwise", quantizer.rowwise_usage), ("columnwise", quantizer.columnwise_usage)):
        fields[f"{way}_data"] = fields[f"{way}_scale_inv"] = None
        if not wanted:
            continue
        columnwise = way == "columnwise"
        data, exponents = scaled(rows.T if columnwise else rows, torch_type(quantizer.dtype))
        if columnwise:
            data, exponents = data.T.contiguous(), exponents.T
        stored = torch.zeros(quantizer.get_scale_shape(tensor.shape, columnwise), dtype=torch.uint8)
        stored[: exponents.shape[0], : exponents.shape[1]] = exponents
        fields[f"{way}_data"], fields[f"{way}_scale_inv"] = data.reshape(tensor.shape), stored
    return fields


def scaled(rows: Tensor, fp8: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return uint8 [M, K] and biased exponents [M, K / 32] of the smallest powers of two without saturation."""
    blocks = rows.unflatten(1, (rows.shape[1] // BLOCK, BLOCK))
    mantissa, exponent = torch.frexp(blocks.abs().amax(-1) / torch.finfo(fp8).max)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent) + BIAS
    exponent = torch.where(mantissa == 0, 0, exponent).clamp(0, 254)
    data = cast(torch.ldexp(blocks, BIAS - exponent[..., None]), fp8)
    return data.flatten(1), exponent.to(torch.uint8)


def mx_plain(tensor: Any, columnwise: bool) -> Tensor:
    """Return float32 of either copy.

    Raises:
        ValueError: the tensor has no such copy, or its scales are not padded as products need them.
    """
    way = "columnwise" if columnwise else "rowwise"
    data, scales = getattr(tensor, f"_{way}_data"), getattr(tensor, f"_{way}_scale_inv")
    if data is None:
        raise ValueError(f"MXFP8 tensor without {way} data")
    values = data.reshape(-1, data.shape[-1]).view(torch_type(tensor._fp8_dtype)).float()
    size = (
        [values.shape[0] // BLOCK, values.shape[1]]
        if columnwise
        else [values.shape[0], values.shape[1] // BLOCK]
    )
    padded = [
        -(-count // unit) * unit
        for count, unit in zip(size, (4, 128) if columnwise else (128, 4), strict=True)
    ]
    if list(scales.shape) != padded:
        raise ValueError(f"MXFP8 scales {tuple(scales.shape)} of {tuple(values.shape)} {way}, not {padded}")
    exponents = scales[: size[0], : size[1]].int() - BIAS
    return torch.ldexp(values, exponents.repeat_interleave(BLOCK, int(not columnwise))).reshape(data.shape)


def empty_mx(quantizer: Any, shape: list[int]) -> dict[str, Any]:
    """Return parts as `mx_blocks` does, still to be filled."""
    specs = quantizer.inner_tensor_specs(tuple(shape))
    fields = {
        f"{way}_{what}": torch.empty(*specs[name][:1], dtype=torch.uint8) if name in specs else None
        for way in ("rowwise", "columnwise")
        for what in ("data", "scale_inv")
        for name in [f"_{way}_{what}"]
    }
    return {**fields, "with_gemm_swizzled_scales": quantizer.optimize_for_gemm}
