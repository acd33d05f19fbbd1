"""The stand-ins' FP8 numbers: properties that a step does not show, for instance because scales are powers of two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.harness.ranks import Layout, run_on_ranks
from tests.transformer_engine import IMAGE, needs_python
from tests.transformer_engine.casts import is_fp8, plain
from tests.transformer_engine.dtypes import DType
from tests.transformer_engine.mxfp8 import BIAS

pytestmark = needs_python

# Exponents of blocks that have nothing in common; one scale could not cover the blocks of a row.
EXPONENTS = torch.tensor([[-100, 0, 40], [100, -60, 3]])
ROUNDING = {DType.kFloat8E4M3: 2.0**-4, DType.kFloat8E5M2: 2.0**-3}


def quantizer_of(kind: str, dtype: DType) -> Any:
    from transformer_engine.pytorch.tensor import (
        Float8BlockQuantizer,
        Float8CurrentScalingQuantizer,
        MXFP8Quantizer,
    )

    def blocks(dimensions: int) -> Any:
        return Float8BlockQuantizer(dtype, rowwise=True, columnwise=True, block_scaling_dim=dimensions)

    makers: dict[str, Callable[[], Any]] = {
        "tensorwise": lambda: Float8CurrentScalingQuantizer(dtype, device=torch.device("cpu")),
        "mxfp8": lambda: MXFP8Quantizer(dtype),
        "activations in blocks": lambda: blocks(1),
        "weights in blocks": lambda: blocks(2),
    }
    return makers[kind]()


BLOCK = {"tensorwise": 256, "mxfp8": 32, "activations in blocks": 128, "weights in blocks": 128}


def random_values(kind: str) -> Tensor:
    """Make values that lie, within a block, within a factor of 2^3."""
    block = BLOCK[kind]
    exponents = EXPONENTS[:1, :1] if kind == "tensorwise" else EXPONENTS
    spread = torch.rand(
        block * exponents.shape[0], block * exponents.shape[1], generator=torch.Generator().manual_seed(0)
    )
    return torch.ldexp(spread * 7 + 1, exponents.repeat_interleave(block, 0).repeat_interleave(block, 1))


def errors(kind: str, dtype: DType) -> list[float]:
    """Return, on one rank, the largest error of each copy, relative to the value."""
    values = random_values(kind)
    tensor = quantizer_of(kind, dtype)(values.unflatten(0, (2, -1)))
    assert is_fp8(tensor)
    assert tensor.shape == (2, len(values) // 2, values.shape[1])
    copies = [plain(tensor, columnwise=columnwise).flatten(0, 1) for columnwise in (False, True)]
    if kind != "mxfp8":  # TransformerEngine has no torch version of MXFP8
        assert torch.equal(tensor.dequantize(dtype=torch.float32).flatten(0, 1), copies[0])
    return [float(((copy - values) / values).abs().max()) for copy in copies]


@pytest.mark.parametrize("kind", BLOCK)
def test_a_block_is_rounded_by_itself(kind: str) -> None:
    for dtype, rounding in ROUNDING.items():
        [found] = run_on_ranks(errors, Layout(), {"kind": kind, "dtype": dtype}, image=IMAGE)
        assert max(found) <= rounding
        assert min(found) > rounding / 2


def copies_differ(kind: str) -> bool:
    """Whether, on one rank, copies differ; rows are so far apart that a column's scale loses its smallest value."""
    values = torch.ldexp(torch.rand(256, 256) + 1, torch.arange(256)[:, None] % 32)
    tensor = quantizer_of(kind, DType.kFloat8E4M3)(values)
    return not torch.equal(plain(tensor), plain(tensor, columnwise=True))


@pytest.mark.parametrize("kind", BLOCK)
def test_scales_along_rows_are_others_than_along_columns(kind: str) -> None:
    wanted = kind in ("mxfp8", "activations in blocks")
    assert run_on_ranks(copies_differ, Layout(), {"kind": kind}, image=IMAGE) == [wanted]


def rowwise_alone(kind: str) -> None:
    """Check, on one rank, a tensor with only its rowwise copy."""
    quantizer = quantizer_of(kind, DType.kFloat8E4M3)
    quantizer.set_usage(columnwise=False)
    tensor = quantizer(torch.ones(256, 256))
    assert plain(tensor).eq(1).all()
    with pytest.raises(ValueError, match="without columnwise data"):
        plain(tensor, columnwise=True)


@pytest.mark.parametrize("kind", BLOCK)
def test_a_product_that_wants_the_other_copy_fails(kind: str) -> None:
    """The product fails as on a Hopper, so that the tests of steps notice which copies are made."""
    run_on_ranks(rowwise_alone, Layout(), {"kind": kind}, image=IMAGE)


def holds_its_largest() -> None:
    """Check, on one rank, that a scale is the smallest power of two that holds its block."""
    values = random_values("mxfp8")
    for dtype, torch_dtype in (
        (DType.kFloat8E4M3, torch.float8_e4m3fn),
        (DType.kFloat8E5M2, torch.float8_e5m2),
    ):
        exponents = quantizer_of("mxfp8", dtype)(values)._rowwise_scale_inv[:64, :3].int() - BIAS
        scale = torch.ldexp(torch.tensor(torch.finfo(torch_dtype).max), exponents)
        top = values.unflatten(1, (3, 32)).amax(-1)
        assert bool(((scale / 2 < top) & (top <= scale)).all())


def test_mxfp8_takes_the_smallest_power_of_two() -> None:
    run_on_ranks(holds_its_largest, Layout(), image=IMAGE)


def zero_and_empty() -> None:
    """Check, on one rank, zeros and an empty tensor."""
    quantizer = quantizer_of("mxfp8", DType.kFloat8E4M3)
    assert not plain(quantizer(torch.zeros(32, 64))).any()
    assert plain(quantizer(torch.zeros(0, 64)), columnwise=True).shape == (0, 64)


def test_no_numbers_and_none_but_zeros() -> None:
    run_on_ranks(zero_and_empty, Layout(), image=IMAGE)
