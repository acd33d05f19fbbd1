"""The stand-in's MXFP8 numbers: what a step does not tell apart, because scales are powers of two."""

from __future__ import annotations

import torch

from tests.ranks import Layout, run_on_ranks
from tests.transformer_engine import IMAGE, needs_python
from tests.transformer_engine.casts import is_fp8, plain
from tests.transformer_engine.dtypes import DType
from tests.transformer_engine.mxfp8 import BIAS

pytestmark = needs_python

# Blocks that have nothing in common; those of a row lie within what one scale could not hold.
EXPONENTS = torch.tensor([[-100, 0, 40], [100, -60, 3]])
ROUNDING = {DType.kFloat8E4M3: 2.0**-4, DType.kFloat8E5M2: 2.0**-3}


def errors(dtype: DType) -> list[float]:
    """Body on one rank: the largest error of each copy, relative to the value, of numbers within 2^3 of each other."""
    from transformer_engine.pytorch.tensor import MXFP8Quantizer

    spread = torch.rand(64, 96, generator=torch.Generator().manual_seed(0)) * 7 + 1
    values = torch.ldexp(spread, EXPONENTS.repeat_interleave(32, 0).repeat_interleave(32, 1))
    tensor = MXFP8Quantizer(dtype)(values.unflatten(0, (2, 32)))
    assert is_fp8(tensor)
    assert tensor.shape == (2, 32, 96)
    largest = torch.finfo(torch.float8_e4m3fn if dtype == DType.kFloat8E4M3 else torch.float8_e5m2).max
    scale = torch.ldexp(torch.tensor(largest), tensor._rowwise_scale_inv[:64, :3].int() - BIAS)
    top = values.unflatten(1, (3, 32)).amax(-1)
    assert bool(((scale / 2 < top) & (top <= scale)).all())  # the smallest power that holds it
    copies = [plain(tensor, columnwise=columnwise).flatten(0, 1) for columnwise in (False, True)]
    return [float(((copy - values) / values).abs().max()) for copy in copies]


def test_a_block_is_rounded_by_itself() -> None:
    for dtype, rounding in ROUNDING.items():
        [found] = run_on_ranks(errors, Layout(), {"dtype": dtype}, image=IMAGE)
        assert max(found) <= rounding
        assert min(found) > rounding / 2


def zero_and_empty() -> None:
    """Body on one rank."""
    from transformer_engine.pytorch.tensor import MXFP8Quantizer

    quantizer = MXFP8Quantizer(DType.kFloat8E4M3)
    assert not plain(quantizer(torch.zeros(32, 64))).any()
    assert plain(quantizer(torch.zeros(0, 64)), columnwise=True).shape == (0, 64)


def test_no_numbers_and_none_but_zeros() -> None:
    run_on_ranks(zero_and_empty, Layout(), image=IMAGE)
