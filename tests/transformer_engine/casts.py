"""FP8 numbers in torch, held in TransformerEngine's own tensors and scaled by its recipes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tests.transformer_engine.dtypes import cast, torch_type
from tests.transformer_engine.mxfp8 import empty_mx, is_mx, mx_blocks, mx_plain

BLOCK = 128


def plain(tensor: Any, *, columnwise: bool = False) -> Tensor:
    """Return a tensor, in FP8 or not, as float32 (float64 stays).

    Args:
        columnwise: whether to read the second copy of a tensor in FP8; on a Hopper one copy cannot replace the other.

    Raises:
        ValueError: the tensor has no such copy.
    """
    if is_mx(tensor):
        return mx_plain(tensor, columnwise)
    if hasattr(tensor, "_is_2D_scaled"):
        return plain_blocks(tensor, columnwise)
    if is_fp8(tensor):
        return plain_whole(tensor, columnwise)
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def is_fp8(tensor: Any) -> bool:
    return hasattr(tensor, "dequantize") and type(tensor) not in (Tensor, torch.nn.Parameter)


def quantize(tensor: Tensor, quantizer: Any, output: Any = None, noop: Tensor | None = None) -> Any:
    """Return `tensor` in FP8 by the quantizer's recipe; write into `output` if it is given."""
    if noop is not None and noop.item():
        return output
    fields = parts(tensor, quantizer)
    if output is None:
        return made(fields, tensor.shape, tensor.dtype, quantizer)
    for name, value in fields.items():
        setattr(output, PRIVATE[name], value)
    if hasattr(output, "_transpose_invalid"):
        output._transpose_invalid = output._transpose is None
    return output


def parts(tensor: Tensor, quantizer: Any) -> dict[str, Any]:
    """Return the parts of a tensor in FP8."""
    if is_mx(quantizer):
        return mx_blocks(tensor, quantizer)
    return blocks(tensor, quantizer) if is_blockwise(quantizer) else whole(tensor, quantizer)


def create_empty_quantized_tensor(
    quantizer: Any, shape: list[int], dtype: torch.dtype, _device: Any, _pinned: bool
) -> Any:
    if is_mx(quantizer):
        return made(empty_mx(quantizer, shape), shape, dtype, quantizer)
    fields: dict[str, Any] = {"data": None, "data_transpose": None, "fp8_scale_inv": torch.ones(1)}
    if quantizer.rowwise_usage:
        fields["data"] = torch.empty(shape, dtype=torch.uint8)
    if quantizer.columnwise_usage:
        fields["data_transpose"] = torch.empty((shape[-1], *shape[:-1]), dtype=torch.uint8)
    return made(fields, shape, dtype, quantizer)


# The attributes in which a tensor keeps its parts.
PRIVATE = {"data": "_data", "data_transpose": "_transpose", "fp8_scale_inv": "_scale_inv"}
PRIVATE |= {
    f"{way}_{what}": f"_{way}_{what}" for way in ("rowwise", "columnwise") for what in ("data", "scale_inv")
}
PRIVATE["with_gemm_swizzled_scales"] = "_with_gemm_swizzled_scales"


def is_blockwise(quantizer: Any) -> bool:
    return hasattr(quantizer, "block_scaling_dim")


def made(fields: dict[str, Any], shape: Any, dtype: torch.dtype, quantizer: Any) -> Any:
    """Make TransformerEngine's own tensor of these bytes."""
    from transformer_engine.pytorch import tensor as te

    kind, internal = te.Float8Tensor, te.Float8TensorStorage
    fields = {**fields, "fp8_dtype": quantizer.dtype, "quantizer": quantizer}
    if is_mx(quantizer):
        kind, internal = te.MXFP8Tensor, te.MXFP8TensorStorage
    elif is_blockwise(quantizer):
        kind, internal = te.Float8BlockwiseQTensor, te.Float8BlockwiseQTensorStorage
        fields["is_2D_scaled"] = quantizer.block_scaling_dim == 2
    if quantizer.internal:
        return internal(**fields, fake_dtype=dtype)
    return kind(shape=shape, dtype=dtype, device=torch.device("cpu"), **fields)


def whole(tensor: Tensor, quantizer: Any) -> dict[str, Any]:
    """Quantize with one scale for the tensor: the quantizer's own (delayed), or one from the present values."""
    fp8 = torch_type(quantizer.dtype)
    amax = tensor.detach().abs().max().float() if tensor.numel() else torch.zeros(())
    if hasattr(quantizer, "scale"):  # delayed
        quantizer.amax.copy_(torch.maximum(quantizer.amax.reshape(()), amax).reshape(quantizer.amax.shape))
        scale = quantizer.scale.reshape(()).clone()
    else:
        if quantizer.with_amax_reduction:
            dist.all_reduce(amax, dist.ReduceOp.MAX, group=quantizer.amax_reduction_group)
        scale = scale_of(amax, fp8, quantizer.force_pow_2_scales, quantizer.amax_epsilon)
    data = cast(tensor * scale, fp8)
    turned = data.movedim(-1, 0).contiguous() if quantizer.columnwise_usage else None
    return {
        "data": data if quantizer.rowwise_usage else None,
        "data_transpose": turned,
        "fp8_scale_inv": (1 / scale).reshape(1),
    }


def blocks(tensor: Tensor, quantizer: Any) -> dict[str, Any]:
    """Quantize with a scale for 128 x 128 values, or for 128 of a row (in the transposed copy, of a column)."""
    fields: dict[str, Any] = dict.fromkeys(
        ("rowwise_data", "rowwise_scale_inv", "columnwise_data", "columnwise_scale_inv")
    )
    rows = tensor.detach().reshape(-1, tensor.shape[-1])
    for way, wanted in (("rowwise", quantizer.rowwise_usage), ("columnwise", quantizer.columnwise_usage)):
        if not wanted:
            continue
        turned = way == "columnwise"
        data, scales = scaled_blocks((rows.T if turned else rows).contiguous(), quantizer)
        shape = quantizer.get_columnwise_shape(tensor.shape) if turned else tensor.shape
        stored = torch.zeros(quantizer.get_scale_shape(tensor.shape, turned), dtype=torch.float32)
        if quantizer.block_scaling_dim == 1:
            scales = scales.T
        stored[: scales.shape[0], : scales.shape[1]] = 1 / scales
        fields[f"{way}_data"], fields[f"{way}_scale_inv"] = data.reshape(tuple(shape)), stored
    return fields


def plain_whole(tensor: Any, columnwise: bool) -> Tensor:
    """Return float32 of a tensor with one scale; the columnwise copy is transposed."""
    missing = tensor._transpose is None or tensor._transpose_invalid if columnwise else tensor._data is None
    if missing:
        raise ValueError(f"FP8 tensor without {'columnwise' if columnwise else 'rowwise'} data")
    data = tensor._transpose.movedim(0, -1) if columnwise else tensor._data
    return data.view(torch_type(tensor._fp8_dtype)).float() * tensor._scale_inv


def plain_blocks(tensor: Any, columnwise: bool) -> Tensor:
    """Return float32 of a tensor scaled in blocks; the columnwise copy is transposed and has its own scales."""
    way = "columnwise" if columnwise else "rowwise"
    data, inverse = getattr(tensor, f"_{way}_data"), getattr(tensor, f"_{way}_scale_inv")
    if data is None:
        raise ValueError(f"blockwise FP8 tensor without {way} data")
    values = data.view(torch_type(tensor._fp8_dtype)).float()
    rows = values.reshape(len(values), -1) if columnwise else values.reshape(-1, values.shape[-1])
    inverse = inverse.repeat_interleave(BLOCK, 0) if tensor._is_2D_scaled else inverse.T
    inverse = inverse[: rows.shape[0]].repeat_interleave(BLOCK, 1)[:, : rows.shape[1]]
    values = (rows * inverse).reshape(values.shape)
    return values.movedim(0, -1) if columnwise else values


def scaled_blocks(rows: Tensor, quantizer: Any) -> tuple[Tensor, Tensor]:
    """Return uint8 [M, K] and the scales, [M / 128, K / 128] or [M, K / 128], rounded up."""
    fp8 = torch_type(quantizer.dtype)
    height = BLOCK if quantizer.block_scaling_dim == 2 else 1
    m, k = rows.shape
    padded = F.pad(rows.float(), (0, -k % BLOCK, 0, -m % height))
    tiles = padded.reshape(padded.shape[0] // height, height, padded.shape[1] // BLOCK, BLOCK)
    scales = scale_of(tiles.abs().amax((1, 3)), fp8, quantizer.force_pow_2_scales, quantizer.amax_epsilon)
    data = cast(tiles * scales[:, None, :, None], fp8).reshape(padded.shape)[:m, :k]
    return data.contiguous(), scales


def scale_of(amax: Tensor, fp8: torch.dtype, power_of_2: bool, epsilon: float) -> Tensor:
    """Return the scale that brings the largest value to FP8's largest; 1 without values."""
    amax = amax.clamp(min=epsilon)
    scale = torch.where(amax > 0, torch.finfo(fp8).max / amax, torch.ones_like(amax))
    scale = torch.where(scale.isfinite(), scale, torch.ones_like(scale))
    return torch.exp2(torch.floor(torch.log2(scale))) if power_of_2 else scale


def bgrad_quantize(tensor: Tensor, quantizer: Any) -> tuple[Tensor, Any]:
    return tensor.reshape(-1, tensor.shape[-1]).sum(0), quantizer(tensor)


def fp8_transpose(data: Tensor, _dtype: int, out: Tensor | None = None) -> Tensor:
    turned = data.movedim(-1, 0).contiguous()
    return turned if out is None else out.copy_(turned)


def fused_amax_and_scale_update_after_reduction(
    amax: Tensor, histories: list[Tensor], scales: list[Tensor], algorithm: str, fp8: int, margin: int
) -> None:
    """Update delayed scaling; TransformerEngine has this function in torch, too."""
    from transformer_engine.pytorch.quantization import _amax_and_scale_update

    recipe = SimpleNamespace(amax_compute_algo=algorithm, margin=margin, scaling_factor_compute_algo=None)
    largest = torch.finfo(torch_type(fp8)).max
    parts = amax.split([history.shape[1] for history in histories])
    for history, scale, part in zip(histories, scales, parts, strict=True):
        history[0].copy_(part)
        _amax_and_scale_update(history, scale, largest, recipe)


def dequantize(tensor: Any, dtype: int) -> Tensor:
    return plain(tensor, columnwise=tensor._rowwise_data is None).to(torch_type(dtype))
