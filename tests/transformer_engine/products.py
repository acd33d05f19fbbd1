"""Products in plain torch that refuse the shapes that cuBLAS refuses.

Shapes: row-major, `[..., N] = B [..., K] @ A [N, K]^T` for the layout TN, and likewise for NN and NT.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tests.transformer_engine.casts import is_fp8, plain
from tests.transformer_engine.dtypes import torch_type
from tests.transformer_engine.mxfp8 import is_mx


def require(size: int, divisor: int, what: str) -> None:
    if size % divisor:
        raise ValueError(f"{what} {size} of an FP8 product is not a multiple of {divisor}")


def check_shapes(left: Any, right: Any, rows: int, summed: int, columns: int) -> None:
    """Refuse shapes that cuBLAS on Hopper refuses (see TransformerEngine's cublaslt_gemm.cu)."""
    require(summed, 16, "the summed dimension")
    if is_mx(left) != is_mx(right):
        raise ValueError("MXFP8 is multiplied with MXFP8 alone")
    if hasattr(left, "_is_2D_scaled"):
        require(columns, 8, "the width")
        if not right._is_2D_scaled:
            require(rows, 8, "the number of rows")


def generic_gemm(
    left: Any, left_turned: bool, right: Any, right_turned: bool, out: Tensor | None, quantizer: Any,
    out_type: int | None, bias: Tensor | None, _bias_type: int, _gelu: bool, _gelu_in: Any, grad: bool,
    _workspace: Tensor, _workspace_size: int, accumulate: bool, _split: bool, **_overlap: Any,
) -> tuple[Any, Tensor | None, None, None]:  # fmt: skip
    """Return the product, the gradient of a bias, and two outputs of fusions, which are not used."""
    a, b = plain(left, columnwise=not left_turned), plain(right, columnwise=right_turned)
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
        product = product.to(torch_type(out_type))
    return (product if quantizer is None else quantizer(product)), bias_grad, None, None
