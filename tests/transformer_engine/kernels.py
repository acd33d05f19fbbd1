"""`transformer_engine_torch` in plain torch, for CPUs: the kernels that TransformerEngine's own Python calls.

Everything above the kernels is TransformerEngine's: modules, autograd functions, FP8 contexts, scales and their
history, recompute, the content of a checkpoint. FP8 tensors hold real FP8 numbers; a product converts them and
multiplies in float32, as tensor cores do, except for the order of their sums.
"""

from __future__ import annotations

import enum
import zlib
from typing import Any

import torch
from torch import Tensor

from tests.transformer_engine.casts import (
    bgrad_quantize,
    create_empty_quantized_tensor,
    dequantize,
    fp8_transpose,
    fused_amax_and_scale_update_after_reduction,
    quantize,
)
from tests.transformer_engine.dtypes import DType, torch_type
from tests.transformer_engine.grouped import (
    fused_multi_row_padding,
    fused_multi_row_unpadding,
    get_num_cublas_streams,
    split_quantize,
    te_general_grouped_gemm,
)
from tests.transformer_engine.products import generic_gemm

__all__ = [
    "DType",
    "FP8BwdTensors",
    "FP8FwdTensors",
    "NVTE_Fused_Attn_Backend",
    "bgrad_quantize",
    "create_empty_quantized_tensor",
    "dequantize",
    "fp8_transpose",
    "fused_amax_and_scale_update_after_reduction",
    "fused_multi_row_padding",
    "fused_multi_row_unpadding",
    "generic_gemm",
    "get_num_cublas_streams",
    "layernorm_bwd",
    "layernorm_fwd",
    "multi_tensor_adam",
    "multi_tensor_l2norm",
    "multi_tensor_scale",
    "multi_tensor_scale_tensor",
    "quantize",
    "rmsnorm_bwd",
    "rmsnorm_fwd",
    "split_quantize",
    "swap_first_dims",
    "te_general_grouped_gemm",
]

FP8FwdTensors = enum.IntEnum(
    "FP8FwdTensors",
    [f"GEMM{gemm}_{name}" for gemm in (1, 2, 3) for name in ("INPUT", "WEIGHT", "OUTPUT")],
    start=0,
)
FP8BwdTensors = enum.IntEnum(
    "FP8BwdTensors", [f"GRAD_{name}{gemm}" for gemm in (1, 2, 3) for name in ("OUTPUT", "INPUT")], start=0
)


def swap_first_dims(tensor: Tensor, out: Tensor | None = None) -> Tensor:
    swapped = tensor.transpose(0, 1).contiguous()
    return swapped if out is None else out.copy_(swapped)


def gain(weight: Tensor, zero_centered: bool) -> Tensor:
    return weight.float() + 1 if zero_centered else weight.float()


def normed(values: Tensor, out: Tensor | None, quantizer: Any, dtype: int) -> Any:
    values = values.to(torch_type(dtype))
    if quantizer is not None:
        return quantizer(values) if out is None else quantize(values, quantizer, out)
    return values if out is None else out.copy_(values)


def layernorm_fwd(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Any, quantizer: Any, dtype: int,
    _margin: int, zero_centered: bool,
) -> tuple[Any, Tensor, Tensor]:  # fmt: skip
    mean, rsigma = statistics(x, eps)
    values = (x.float() - mean) * rsigma * gain(weight, zero_centered) + bias.float()
    return normed(values, out, quantizer, dtype), mean.reshape(-1), rsigma.reshape(-1)


def statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    mean = x.float().mean(-1, keepdim=True)
    return mean, torch.rsqrt((x.float() - mean).square().mean(-1, keepdim=True) + eps)


def layernorm_bwd(
    dz: Tensor, x: Tensor, mean: Tensor, rsigma: Tensor, weight: Tensor, _margin: int, zero_centered: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dz, rsigma = dz.float(), rsigma.reshape(*x.shape[:-1], 1)
    hat = (x.float() - mean.reshape(rsigma.shape)) * rsigma
    scaled = dz * gain(weight, zero_centered)
    dx = rsigma * (scaled - scaled.mean(-1, keepdim=True) - hat * (scaled * hat).mean(-1, keepdim=True))
    rows = tuple(range(x.dim() - 1))
    return dx.to(x.dtype), (dz * hat).sum(rows).to(weight.dtype), dz.sum(rows).to(weight.dtype)


def rmsnorm_fwd(
    x: Tensor,
    weight: Tensor,
    eps: float,
    out: Any,
    quantizer: Any,
    dtype: int,
    _margin: int,
    zero_centered: bool,
) -> tuple[Any, None, Tensor]:
    rsigma = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return (
        normed(x.float() * rsigma * gain(weight, zero_centered), out, quantizer, dtype),
        None,
        rsigma.reshape(-1),
    )


def rmsnorm_bwd(
    dz: Tensor, x: Tensor, rsigma: Tensor, weight: Tensor, _margin: int, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    dz, rsigma = dz.float(), rsigma.reshape(*x.shape[:-1], 1)
    hat = x.float() * rsigma
    scaled = dz * gain(weight, zero_centered)
    dx = rsigma * (scaled - hat * (scaled * hat).mean(-1, keepdim=True))
    return dx.to(x.dtype), (dz * hat).sum(tuple(range(x.dim() - 1))).to(weight.dtype)


def multi_tensor_l2norm(_chunk: int, _noop: Tensor, lists: list[list[Tensor]], per_tensor: bool) -> Any:
    norms = torch.stack([tensor.float().norm() for tensor in lists[0]])
    return norms.norm().reshape(1), norms if per_tensor else norms[:0]


def multi_tensor_scale(_chunk: int, _noop: Tensor, lists: list[list[Tensor]], scale: float) -> None:
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)


multi_tensor_scale_tensor = multi_tensor_scale


def multi_tensor_adam(
    _chunk: int, _noop: Tensor, lists: list[list[Tensor]], lr: float, beta1: float, beta2: float, eps: float,
    step: int, mode: int, bias_correction: int, weight_decay: float,
) -> None:  # fmt: skip
    """Make a step of AdamW if `mode` is 1, of Adam if it is 0; lists are gradients, values and both moments."""
    correction1, correction2 = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
    for gradient, value, first, second in zip(*lists, strict=True):
        moved = gradient.float() + (0.0 if mode else weight_decay) * value.float()
        first.lerp_(moved.to(first.dtype), 1 - beta1)
        second.mul_(beta2).addcmul_(moved, moved, value=1 - beta2)
        update = (first / correction1) / ((second / correction2).sqrt() + eps)
        value.sub_(lr * (update + (weight_decay if mode else 0.0) * value.float()))


NVTE_Fused_Attn_Backend = enum.IntEnum(
    "NVTE_Fused_Attn_Backend",
    {"NVTE_No_Backend": -1, "NVTE_F16_arbitrary_seqlen": 1, "NVTE_FP8": 2},
)


class _Absent(type):
    """Any other name of the extension: it may be mentioned, but using it is an error."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _absent(f"{cls.__name__}.{name}")

    def __int__(cls) -> int:
        return zlib.crc32(cls.__name__.encode())  # each member of an enumeration needs a number of its own

    def __call__(cls, *_arguments: Any, **_keywords: Any) -> Any:
        raise NotImplementedError(f"transformer_engine_torch.{cls.__name__} has no stand-in for CPUs")


def _absent(name: str) -> Any:
    return _Absent(name, (), {})


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return _absent(name)
