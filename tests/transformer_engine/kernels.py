"""`transformer_engine_torch` in plain torch: the kernels that TransformerEngine's own Python calls, for CPUs.

Everything above them is TransformerEngine's: modules, autograd functions, FP8 contexts, scales and their history,
recompute, what goes into a checkpoint. FP8 tensors hold real FP8 numbers; a product takes them apart and multiplies
in float32, as tensor cores do up to the order of their sums.

Shapes: a product is row-major, `[..., N] = B [..., K] @ A [N, K]^T` for the layout TN, and likewise for NN and NT.
"""

from __future__ import annotations

import enum
import zlib
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "DType",
    "FP8BwdTensors",
    "FP8FwdTensors",
    "NVTE_Fused_Attn_Backend",
    "bgrad_quantize",
    "create_empty_quantized_tensor",
    "fp8_transpose",
    "fused_amax_and_scale_update_after_reduction",
    "generic_gemm",
    "layernorm_bwd",
    "layernorm_fwd",
    "multi_tensor_adam",
    "multi_tensor_l2norm",
    "multi_tensor_scale",
    "multi_tensor_scale_tensor",
    "quantize",
    "rmsnorm_bwd",
    "rmsnorm_fwd",
    "swap_first_dims",
]

BLOCK = 128


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

FP8FwdTensors = enum.IntEnum(
    "FP8FwdTensors",
    [f"GEMM{gemm}_{name}" for gemm in (1, 2, 3) for name in ("INPUT", "WEIGHT", "OUTPUT")],
    start=0,
)
FP8BwdTensors = enum.IntEnum(
    "FP8BwdTensors", [f"GRAD_{name}{gemm}" for gemm in (1, 2, 3) for name in ("OUTPUT", "INPUT")], start=0
)


def plain(tensor: Any) -> Tensor:
    """In float32 (float64 stays), out of FP8 where it is in it."""
    if is_fp8(tensor):
        return tensor.dequantize(dtype=torch.float32)
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def is_fp8(tensor: Any) -> bool:
    return hasattr(tensor, "dequantize") and type(tensor) not in (Tensor, torch.nn.Parameter)


def require(size: int, divisor: int, what: str) -> None:
    if size % divisor:
        raise ValueError(f"{what} {size} of an FP8 product is not a multiple of {divisor}")


def check_shapes(left: Any, right: Any, rows: int, summed: int, columns: int) -> None:
    """As cuBLAS on Hopper wants them (TransformerEngine's cublaslt_gemm.cu): both along the summed dimension."""
    require(summed, 16, "the summed dimension")
    if hasattr(left, "_is_2D_scaled"):
        require(columns, 8, "the width")
        if not right._is_2D_scaled:
            require(rows, 8, "the number of rows")


def generic_gemm(
    left: Any, left_turned: bool, right: Any, right_turned: bool, out: Tensor | None, quantizer: Any,
    out_type: int | None, bias: Tensor | None, _bias_type: int, _gelu: bool, _gelu_in: Any, grad: bool,
    _workspace: Tensor, _workspace_size: int, accumulate: bool, _split: bool, **_overlap: Any,
) -> tuple[Any, Tensor | None, None, None]:  # fmt: skip
    """The product, the gradient of a bias, and two outputs of fusions that nobody asked for."""
    a, b = plain(left), plain(right)
    leading = b.shape[:-1]
    a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    b_turned, a_turned = b.T if right_turned else b, a.T if left_turned else a
    if is_fp8(left) or is_fp8(right):
        check_shapes(left, right, *b_turned.shape, a_turned.shape[1])
    product = b_turned @ a_turned
    bias_grad = None
    if bias is not None and grad:
        bias_grad = b.sum(0).to(bias.dtype)
    elif bias is not None:
        product = product + bias.to(product.dtype)
    if not right_turned:
        product = product.reshape(*leading, product.shape[-1])
    if out is not None:
        product = product.reshape(out.shape).to(out.dtype)
        out.add_(product) if accumulate else out.copy_(product)
        return out, bias_grad, None, None
    if out_type is not None:
        product = product.to(TORCH_TYPES[DType(out_type)])
    return (product if quantizer is None else quantizer(product)), bias_grad, None, None


def quantize(tensor: Tensor, quantizer: Any, output: Any = None, noop: Tensor | None = None) -> Any:
    """`tensor` in FP8 as the quantizer's recipe has it, into `output` where one is given."""
    if noop is not None and noop.item():
        return output
    fields = blocks(tensor, quantizer) if is_blockwise(quantizer) else whole(tensor, quantizer)
    if output is None:
        return made(fields, tensor.shape, tensor.dtype, quantizer)
    for name, value in fields.items():
        setattr(output, PRIVATE[name], value)
    if not is_blockwise(quantizer):
        output._transpose_invalid = output._transpose is None
    return output


def create_empty_quantized_tensor(
    quantizer: Any, shape: list[int], dtype: torch.dtype, _device: Any, _pinned: bool
) -> Any:
    fields: dict[str, Any] = {"data": None, "data_transpose": None, "fp8_scale_inv": torch.ones(1)}
    if quantizer.rowwise_usage:
        fields["data"] = torch.empty(shape, dtype=torch.uint8)
    if quantizer.columnwise_usage:
        fields["data_transpose"] = torch.empty((shape[-1], *shape[:-1]), dtype=torch.uint8)
    return made(fields, shape, dtype, quantizer)


# Where a tensor keeps what it is made of.
PRIVATE = {"data": "_data", "data_transpose": "_transpose", "fp8_scale_inv": "_scale_inv"}
PRIVATE |= {
    f"{way}_{what}": f"_{way}_{what}" for way in ("rowwise", "columnwise") for what in ("data", "scale_inv")
}


def is_blockwise(quantizer: Any) -> bool:
    return hasattr(quantizer, "block_scaling_dim")


def made(fields: dict[str, Any], shape: Any, dtype: torch.dtype, quantizer: Any) -> Any:
    """TransformerEngine's own tensor of these bytes."""
    from transformer_engine.pytorch import tensor as te

    kind, internal = te.Float8Tensor, te.Float8TensorStorage
    fields = {**fields, "fp8_dtype": quantizer.dtype, "quantizer": quantizer}
    if is_blockwise(quantizer):
        kind, internal = te.Float8BlockwiseQTensor, te.Float8BlockwiseQTensorStorage
        fields["is_2D_scaled"] = quantizer.block_scaling_dim == 2
    if quantizer.internal:
        return internal(**fields, fake_dtype=dtype)
    return kind(shape=shape, dtype=dtype, device=torch.device("cpu"), **fields)


def whole(tensor: Tensor, quantizer: Any) -> dict[str, Any]:
    """One scale for the tensor: the quantizer's own (delayed), or from what is there now."""
    fp8 = TORCH_TYPES[DType(int(quantizer.dtype))]
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
    """A scale for 128 x 128 values, or for 128 of a row (and of a column in the turned copy)."""
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


def scaled_blocks(rows: Tensor, quantizer: Any) -> tuple[Tensor, Tensor]:
    """uint8 [M, K] and the scales, [M / 128, K / 128] or [M, K / 128], rounded up."""
    fp8 = TORCH_TYPES[DType(int(quantizer.dtype))]
    height = BLOCK if quantizer.block_scaling_dim == 2 else 1
    m, k = rows.shape
    padded = F.pad(rows.float(), (0, -k % BLOCK, 0, -m % height))
    tiles = padded.reshape(padded.shape[0] // height, height, -1, BLOCK)
    scales = scale_of(tiles.abs().amax((1, 3)), fp8, quantizer.force_pow_2_scales, quantizer.amax_epsilon)
    data = cast(tiles * scales[:, None, :, None], fp8).reshape(padded.shape)[:m, :k]
    return data.contiguous(), scales


def scale_of(amax: Tensor, fp8: torch.dtype, power_of_2: bool, epsilon: float) -> Tensor:
    """Brings the largest value to FP8's; 1 where there is none."""
    amax = amax.clamp(min=epsilon)
    scale = torch.where(amax > 0, torch.finfo(fp8).max / amax, torch.ones_like(amax))
    scale = torch.where(scale.isfinite(), scale, torch.ones_like(scale))
    return torch.exp2(torch.floor(torch.log2(scale))) if power_of_2 else scale


def cast(scaled: Tensor, fp8: torch.dtype) -> Tensor:
    """To FP8, saturating, as bytes."""
    largest = torch.finfo(fp8).max
    return scaled.detach().float().clamp(-largest, largest).to(fp8).view(torch.uint8).contiguous()


def bgrad_quantize(tensor: Tensor, quantizer: Any) -> tuple[Tensor, Any]:
    return tensor.reshape(-1, tensor.shape[-1]).sum(0), quantizer(tensor)


def fp8_transpose(data: Tensor, _dtype: int, out: Tensor | None = None) -> Tensor:
    turned = data.movedim(-1, 0).contiguous()
    return turned if out is None else out.copy_(turned)


def swap_first_dims(tensor: Tensor, out: Tensor | None = None) -> Tensor:
    swapped = tensor.transpose(0, 1).contiguous()
    return swapped if out is None else out.copy_(swapped)


def gain(weight: Tensor, zero_centered: bool) -> Tensor:
    return weight.float() + 1 if zero_centered else weight.float()


def normed(values: Tensor, out: Tensor | None, quantizer: Any, dtype: int) -> Any:
    values = values.to(TORCH_TYPES[DType(int(dtype))])
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


def fused_amax_and_scale_update_after_reduction(
    amax: Tensor, histories: list[Tensor], scales: list[Tensor], algorithm: str, fp8: int, margin: int
) -> None:
    """Delayed scaling's update: TransformerEngine has it in torch, too."""
    from transformer_engine.pytorch.quantization import _amax_and_scale_update

    recipe = SimpleNamespace(amax_compute_algo=algorithm, margin=margin, scaling_factor_compute_algo=None)
    largest = torch.finfo(TORCH_TYPES[DType(int(fp8))]).max
    parts = amax.split([history.shape[1] for history in histories])
    for history, scale, part in zip(histories, scales, parts, strict=True):
        history[0].copy_(part)
        _amax_and_scale_update(history, scale, largest, recipe)


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
    """AdamW where `mode` is 1, Adam where it is 0; gradients, values, both moments."""
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
    """Any other name of the extension: fine to mention, an error to use."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _absent(f"{cls.__name__}.{name}")

    def __int__(cls) -> int:
        return zlib.crc32(cls.__name__.encode())  # a number of its own for what is a member of an enumeration

    def __call__(cls, *_arguments: Any, **_keywords: Any) -> Any:
        raise NotImplementedError(f"transformer_engine_torch.{cls.__name__} has no stand-in for CPUs")


def _absent(name: str) -> Any:
    return _Absent(name, (), {})


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return _absent(name)
