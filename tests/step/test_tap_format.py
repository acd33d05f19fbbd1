"""FP8 taps: their precision and size, and the treatment of zeros, outliers and values that are not finite."""

from __future__ import annotations

import pytest
import torch

from megatron_fdd.step.teacher.tap_format import TapFormat

HALF_STEP = 2**-4  # e4m3 has three bits after the point; rounding is to the nearest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e4])
def test_an_entry_is_right_to_half_a_step(dtype: torch.dtype, size: float) -> None:
    tap_SBT = (torch.randn(5, 3, 70, generator=torch.Generator().manual_seed(1)) * size).to(dtype)
    tap_SBT[2, 1, 7] *= 1000  # like the few huge entries of a real hidden state
    fp8 = TapFormat(dtype, is_fp8=True)
    packed = fp8.pack(tap_SBT)
    assert packed.dtype == torch.uint8
    assert packed.shape == (5, 3, fp8.packed_width(70))
    assert packed[0, 0].nbytes == fp8.token_bytes(70) == 74
    back_SBT = fp8.unpack(packed)
    assert back_SBT.dtype == dtype
    error, exact = (back_SBT.double() - tap_SBT.double()).abs(), tap_SBT.double().abs()
    smallest = exact.amax(-1, keepdim=True) / 448 * 2**-6
    # The result is rounded once more, to bf16.
    assert (error <= exact * (HALF_STEP * 1.07) + smallest * HALF_STEP).all()
    assert error.max() > 0


def test_the_largest_entry_of_a_token_is_kept() -> None:
    tap_SBT = torch.tensor([[[3.0, -0.3, 0.0]], [[0.25, 0.5, -7.0]]])
    fp8 = TapFormat(torch.float32, is_fp8=True)
    back_SBT = fp8.unpack(fp8.pack(tap_SBT))
    torch.testing.assert_close(back_SBT[0, 0, 0], tap_SBT[0, 0, 0], rtol=1e-6, atol=0)
    torch.testing.assert_close(back_SBT[1, 0, 2], tap_SBT[1, 0, 2], rtol=1e-6, atol=0)


def test_zeros_stay_and_damage_shows() -> None:
    tap_SBT = torch.randn(4, 1, 8)
    tap_SBT[0] = 0
    tap_SBT[1, 0, 3] = float("inf")
    tap_SBT[2, 0, 3] = float("nan")
    fp8 = TapFormat(torch.float32, is_fp8=True)
    back_SBT = fp8.unpack(fp8.pack(tap_SBT))
    assert (back_SBT[0] == 0).all()
    assert not back_SBT[1].isfinite().all()
    assert not back_SBT[2].isfinite().all()
    assert back_SBT[3].isfinite().all()


def test_a_single_token_of_any_width() -> None:
    fp8 = TapFormat(torch.float32, is_fp8=True)
    tap_SBT = torch.full((1, 1, 70), 3.0)
    torch.testing.assert_close(fp8.unpack(fp8.pack(tap_SBT)), tap_SBT, rtol=1e-6, atol=0)


def test_bf16_is_left_alone() -> None:
    tap_SBT = torch.randn(2, 2, 6, dtype=torch.bfloat16)
    plain = TapFormat(torch.bfloat16, is_fp8=False)
    assert plain.unpack(plain.pack(tap_SBT)) is tap_SBT
    assert (plain.packed_dtype, plain.token_bytes(6)) == (torch.bfloat16, 12)
