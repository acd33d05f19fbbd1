"""Matrix products in full float32, whatever rounding the user allows for other products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_fdd.ops.vocab_tiles import accumulate, product_dtype


@contextmanager
def full_precision() -> Iterator[None]:
    """Keep float32 operands from being rounded to TF32 or bf16, in a `with` block or in a decorated function.

    Torch keeps this choice for the whole process and in two interfaces, which must agree wherever one of them is
    read: both are set here and then restored. A product is launched with the choice of that moment, so that later
    ones follow the user's choice again. No host synchronisation.
    """
    chosen = [backend.fp32_precision for backend in _backends()]
    for backend in _backends():
        backend.fp32_precision = "ieee"
    # Only now is the older setting sure to be readable: torch refuses to read it while the two disagree.
    chosen_level = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    for backend in _backends():
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(chosen_level)
        for backend, precision in zip(_backends(), chosen, strict=True):
            backend.fp32_precision = precision


def add_exact_product(total: Tensor, left: Tensor, right: Tensor | Parts) -> Tensor:
    """Add left @ right to `total`, in float32 (float64 stays float64), and return `total`.

    On a GPU it is computed as three products of bf16 parts on the tensor cores, which take half the time of TF32 parts.
    They leave out 2^-18 of the factors, and the tensor cores round sums down: with 4,096 terms by 1e-5 of the norm on
    an H100. Factors should be centred, so that no large terms cancel.

    Args:
        right: a factor, or what `prepared` made of it.
    """
    factor = prepared(right) if isinstance(right, Tensor) else right
    if isinstance(factor, Tensor):
        return total.addmm_(left, factor)
    return _add_product_of_parts(total, _bf16_parts(left), factor)


def exact_product(left: Tensor, right: Tensor | Parts) -> Tensor:
    """Return left @ right, computed as in `add_exact_product`."""
    columns = (right if isinstance(right, Tensor) else right.high).shape[1]
    return add_exact_product(left.new_zeros(left.shape[0], columns), left, right)


class Parts(NamedTuple):
    """A float32 matrix as numbers of bf16 and the bf16 of what they leave; in a dtype that this device multiplies."""

    high: Tensor
    low: Tensor


def _bf16_parts(tensor: Tensor) -> Parts:
    """Split float32 numbers; the sum of the parts is off by at most 2^-17 of a number."""
    high = tensor.bfloat16()
    low = (tensor - high).bfloat16()
    dtype = product_dtype(high)
    return Parts(high.to(dtype), low.to(dtype))


def prepared(tensor: Tensor) -> Tensor | Parts:
    """Return a factor of many products in the form in which they read it."""
    return _bf16_parts(tensor) if _are_split(tensor) else tensor


def _are_split(tensor: Tensor) -> bool:
    """Tell whether products read these numbers as parts: where tensor cores multiply bf16 into float32."""
    return tensor.is_cuda and tensor.dtype == torch.float32


def _add_product_of_parts(total: Tensor, left: Parts, right: Parts) -> Tensor:
    """Add three of the parts' four products to `total`, the smallest is left out, and return `total`."""
    for one, other in ((left.low, right.high), (left.high, right.low), (left.high, right.high)):
        accumulate(total, one, other)
    return total


def _backends() -> list[Any]:
    """Return the places where the newer interface keeps the choice; torch 2.8 has only the older interface."""
    places = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    return [place for place in places if hasattr(place, "fp32_precision")]
