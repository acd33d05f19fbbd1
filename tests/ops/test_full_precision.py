"""The user's choice of precision: replaced and then restored, in whichever of torch's two interfaces it was made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from megatron_fdd.ops.full_precision import _precision, _tf32_parts, full_precision

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


@pytest.mark.parametrize("choice", CHOICES)
def test_tf32_inside_of_full_precision(choice: str) -> None:
    CHOICES[choice]()
    chosen = state()
    with full_precision():
        with _precision("tf32", "high"):
            assert state() == ["tf32", "tf32", "high", "True"]
        assert state() == ["ieee", "ieee", "highest", "False"]
    assert state() == chosen


def test_restored_after_an_error() -> None:
    torch.set_float32_matmul_precision("medium")
    chosen = state()
    with pytest.raises(RuntimeError, match="shapes"), full_precision():
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert state() == chosen


def test_tf32_parts_are_exact_and_narrow() -> None:
    """The three products omit 2^-22 of the result; the product of the upper parts alone is 500 times less exact."""
    left, right = (
        torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in ((40, 300), (300, 20))
    )
    (left_high, left_low), (right_high, right_low) = _tf32_parts(left), _tf32_parts(right)
    assert torch.equal(left_high + left_low, left)
    for part in (left_high, right_high):
        assert not (part.view(torch.int32) & (2**13 - 1)).any()
    wanted = left.double() @ right.double()
    high = left_high.double() @ right_high.double()
    three = high + left_low.double() @ right_high.double() + left_high.double() @ right_low.double()
    assert (three - wanted).norm() < 2**-20 * wanted.norm()
    assert (high - wanted).norm() > 2**-13 * wanted.norm()
