"""The user's choice of precision: replaced and then restored, in whichever of torch's two interfaces it was made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from megatron_fdd.ops import full_precision as precision
from megatron_fdd.ops.full_precision import full_precision

CUDA, CPU = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul


def set_new(backend: Any, precision: str) -> None:
    backend.fp32_precision = precision


CHOICES: dict[str, Callable[[], None]] = {
    "nothing": lambda: None,
    "allow_tf32": lambda: setattr(CUDA, "allow_tf32", True),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "cuda": lambda: set_new(CUDA, "tf32"),
    "cpu": lambda: set_new(CPU, "bf16"),
    "everything": lambda: set_new(torch.backends, "tf32"),
}


def state() -> list[str]:
    """Return the state of both interfaces, as far as torch can be asked."""
    found = [CUDA.fp32_precision, CPU.fp32_precision]
    for read in (torch.get_float32_matmul_precision, lambda: CUDA.allow_tf32):
        try:
            found.append(str(read()))
        except RuntimeError:
            found.append("contradiction")
    return found


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    for backend in (CUDA, CPU):
        backend.fp32_precision = "none"


@pytest.mark.parametrize("choice", CHOICES)
def test_full_precision_inside_and_as_before_outside(choice: str) -> None:
    untouched = state()
    CHOICES[choice]()
    chosen = state()
    assert (chosen == untouched) == (choice == "nothing")
    with full_precision():
        assert state() == ["ieee", "ieee", "highest", "False"]
        with full_precision():
            pass
        assert state() == ["ieee", "ieee", "highest", "False"]
    assert state() == chosen


def test_restored_after_an_error() -> None:
    torch.set_float32_matmul_precision("medium")
    chosen = state()
    with pytest.raises(RuntimeError, match="shapes"), full_precision():
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert state() == chosen


def test_products_of_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three products leave out 2^-18 of the factors; the product of the upper parts alone is 200 times less exact."""
    left, right = (
        torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in ((40, 300), (300, 20))
    )
    monkeypatch.setattr(precision, "_are_split", lambda tensor: tensor.dtype == torch.float32)
    wanted = left.double() @ right.double()
    parts = precision.prepared(right)
    assert isinstance(parts, precision.Parts)
    for part in parts:
        assert torch.equal(part, part.bfloat16().float())
    assert (parts.high + parts.low - right).abs().max() <= 2**-17 * right.abs().max()
    for factor in (right, parts):
        three = precision.exact_product(left, factor)
        assert 2**-22 * wanted.norm() < (three - wanted).norm() < 2**-17 * wanted.norm()
    high = left.bfloat16().double() @ right.bfloat16().double()
    assert (high - wanted).norm() > 2**-10 * wanted.norm()
    assert precision.prepared(right.double()).dtype == torch.float64
