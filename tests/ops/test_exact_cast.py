"""Transport of float32 numbers in narrower tensors: value and gradient are exact to the last bit."""

from __future__ import annotations

import pytest
import torch

from megatron_fdd.ops.exact_cast import from_rows, rows_needed, to_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 7, 64, 65])
def test_values_and_gradients_survive_to_the_last_bit(dtype: torch.dtype, count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    value = (torch.randn(count, generator=generator) * 20).requires_grad_()
    rows = to_rows(value, 16, dtype)
    assert rows.dtype == dtype
    assert rows.shape == (rows_needed(count, 16, dtype), 16)
    back = from_rows(rows, count)
    assert torch.equal(back, value)
    upstream = torch.randn(count, generator=generator) * 0.01
    (back * upstream).sum().backward()
    assert torch.equal(value.grad, upstream)


def test_rounding_once_would_lose_bits() -> None:
    value = torch.tensor([10.123456])
    assert value.bfloat16().float() != value
    assert torch.equal(from_rows(to_rows(value, 4, torch.bfloat16), 1), value)


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_and_large_numbers(dtype: torch.dtype) -> None:
    value = torch.tensor([0.0, 1e-3, -12.345678, 999.87654])
    assert torch.equal(from_rows(to_rows(value, 5, dtype), 4), value)
