"""Experts multiplied together: TransformerEngine's GroupedLinear, one split after the other."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tests.transformer_engine.products import generic_gemm


def get_num_cublas_streams() -> int:
    return 1


def split_quantize(
    tensor: Tensor, sizes: list[int], quantizers: list[Any], *, disable_bulk_allocation: bool = False
) -> list[Any]:
    return [quantizer(part) for part, quantizer in zip(tensor.split(sizes), quantizers, strict=True)]


def te_general_grouped_gemm(
    lefts: list[Any], left_turned: bool, rights: list[Any], right_turned: bool, outs: list[Tensor],
    out_type: int, sizes: list[int], biases: list[Tensor], bias_type: int, single_output: bool, _gelu_in: Any,
    grad: bool, workspaces: list[Tensor], workspace_size: int, accumulate: bool, split: bool, _multiprocessors: int,
) -> list[Tensor]:  # fmt: skip
    """Multiply into `outs`, or into the splits of its only tensor; return biases, or their gradients if `grad`."""
    parts = outs[0].split(sizes) if single_output else outs
    for left, right, out, bias in zip(lefts, rights, parts, biases, strict=True):
        if 0 in (*left.size(), *right.size()):  # an expert without tokens
            if not accumulate:
                out.zero_()
            if grad:
                bias.zero_()
            continue
        _, bias_grad, _, _ = generic_gemm(
            left, left_turned, right, right_turned, out, None, out_type, bias if bias.numel() else None, bias_type,
            False, None, grad, workspaces[0], workspace_size, accumulate, split,
        )  # fmt: skip
        if bias_grad is not None:
            bias.copy_(bias_grad)
    return biases


def fused_multi_row_padding(rows: Tensor, out: Tensor, sizes: list[int], padded_sizes: list[int]) -> None:
    """Pad the rows of each split with zeros."""
    out.zero_()
    for part, padded in zip(rows.split(sizes), out.split(padded_sizes), strict=True):
        padded[: len(part)] = part


def fused_multi_row_unpadding(rows: Tensor, out: Tensor, padded_sizes: list[int], sizes: list[int]) -> None:
    for padded, part in zip(rows.split(padded_sizes), out.split(sizes), strict=True):
        part.copy_(padded[: len(part)])
