"""FP8 and int8 taps: precision and size, and the treatment of zeros, outliers and values that are not finite."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from torch import Tensor

from megatron_fdd.step.teacher.tap_format import TapForm, TapFormat

HALF_STEP = 2**-4  # e4m3 has three bits after the point; rounding is to the nearest
BF16_HALF_STEP = 2**-8
SMALLEST = torch.finfo(torch.float32).tiny
DTYPES = (torch.float32, torch.bfloat16)
PACKED: tuple[TapForm, ...] = ("fp8", "int8")
# Widths of an int8 record with and without padding, and with every entry kept.
WIDTHS = (8, 12, 70, 80, 4096)


def hidden(shape: tuple[int, ...], size: float = 1.0, seed: int = 1) -> Tensor:
    """Return made-up hidden states with a few huge entries, like those of a real model."""
    tap = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size
    tap[..., 3] *= 1000
    tap[..., 5] *= -30
    return tap


def there_and_back(tap: Tensor, form: TapForm) -> Tensor:
    chosen = TapFormat(tap.dtype, form)
    back = chosen.unpack(chosen.pack(tap), tap.shape[-1])
    assert (back.dtype, back.shape) == (tap.dtype, tap.shape)
    return back


def reference(token: list[float]) -> tuple[list[int], float]:
    """Return the positions that an int8 record of a token must keep (fewer than 8 if some are tied), and its scale."""
    in_order = sorted(map(abs, token), reverse=True)
    largest_of_rest = in_order[8] if len(token) > 8 else 0.0
    kept = [index for index, value in enumerate(token) if abs(value) > largest_of_rest]
    return kept, max(largest_of_rest / 127, SMALLEST)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e4])
def test_an_entry_in_fp8_is_right_to_half_a_step(dtype: torch.dtype, size: float) -> None:
    tap_SBT = hidden((5, 3, 70), size).to(dtype)
    fp8 = TapFormat(dtype, "fp8")
    packed = fp8.pack(tap_SBT)
    assert packed.dtype == torch.uint8
    assert packed.shape == (5, 3, fp8.packed_width(70))
    assert packed[0, 0].nbytes == fp8.token_bytes(70) == 74
    error, exact = (there_and_back(tap_SBT, "fp8").double() - tap_SBT.double()).abs(), tap_SBT.double().abs()
    smallest = exact.amax(-1, keepdim=True) / 448 * 2**-6
    # The result is rounded once more, to bf16.
    assert (error <= exact * (HALF_STEP * 1.07) + smallest * HALF_STEP).all()
    assert error.max() > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("size", [1e-40, 1e-36, 1e-3, 1e4])
def test_an_entry_in_int8_is_right_to_half_a_scale(dtype: torch.dtype, width: int, size: float) -> None:
    tap_RT = hidden((3, width), size).to(dtype)
    back_RT = there_and_back(tap_RT, "int8")
    for token, back in zip(tap_RT.double().tolist(), back_RT.double().tolist(), strict=True):
        kept, scale = reference(token)
        for index, (value, found) in enumerate(zip(token, back, strict=True)):
            if index in kept:
                assert found == torch.tensor(value).bfloat16().item()
            else:
                bound = scale / 2 * (1 + 1e-5)
                # A bf16 result is rounded once more.
                bound += (abs(value) + bound) * BF16_HALF_STEP if dtype == torch.bfloat16 else 0.0
                assert abs(found - value) <= bound
    assert width == 8 or size < 1e-30 or not back_RT.equal(tap_RT)


@pytest.mark.parametrize("width", WIDTHS)
def test_an_int8_record_byte_by_byte(width: int) -> None:
    int8, tap_RT = TapFormat(torch.bfloat16, "int8"), hidden((4, width)).bfloat16()
    tap_RT[1] = 0
    packed_RP = int8.pack(tap_RT)
    assert packed_RP.dtype == int8.packed_dtype == torch.uint8
    assert packed_RP.shape == (4, int8.packed_width(width))
    assert packed_RP[0].nbytes == int8.token_bytes(width) == math.ceil((width + 36) / 16) * 16
    for token, record in zip(tap_RT.double().tolist(), packed_RP, strict=True):
        kept, scale = reference(token)
        found_scale = record[width:][:4].clone().view(torch.float32).item()
        assert found_scale == pytest.approx(scale, rel=1e-6, abs=0)
        positions = record[width + 4 :][:16].clone().view(torch.uint16).tolist()
        values = record[width + 20 :][:16].clone().view(torch.bfloat16).tolist()
        assert len(set(positions)) == 8
        assert set(positions) >= set(kept)
        assert values == [token[position] for position in positions]
        for index, value in enumerate(record[:width].view(torch.int8).tolist()):
            assert value == 0 if index in positions else abs(value - token[index] / found_scale) <= 0.5001
        assert not record[width + 36 :].any()


def test_sizes_by_hand() -> None:
    """Bytes of a token as docs/performance.md has them."""
    sizes = {form: TapFormat(torch.bfloat16, form).token_bytes(4096) for form in get_args(TapForm)}
    assert sizes == {"float32": 8192, "bf16": 8192, "fp8": 4100, "int8": 4144}
    assert TapFormat(torch.bfloat16, "int8").token_bytes(576) == 624


def test_the_largest_entry_of_a_token_is_kept_in_fp8() -> None:
    back_SBT = there_and_back(torch.tensor([[[3.0, -0.3, 0.0]], [[0.25, 0.5, -7.0]]]), "fp8")
    torch.testing.assert_close(back_SBT[0, 0, 0], torch.tensor(3.0), rtol=1e-6, atol=0)
    torch.testing.assert_close(back_SBT[1, 0, 2], torch.tensor(-7.0), rtol=1e-6, atol=0)


def test_a_huge_outlier_does_not_hurt_the_others_in_int8() -> None:
    """Nor do up to 8; a ninth takes the scale."""
    plain_RT = torch.randn(1, 256, generator=torch.Generator().manual_seed(2))
    for count in (1, 8, 9):
        tap_RT = plain_RT.clone()
        tap_RT[0, 10 : 10 + count] = 1e6
        error = (there_and_back(tap_RT, "int8") - tap_RT).abs()[0, 10 + count :].max()
        assert (error > 0.5) if count == 9 else (0 < error < 0.02)


@pytest.mark.parametrize("form", PACKED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_stay_and_damage_shows(form: TapForm, dtype: torch.dtype) -> None:
    tap_SBT = hidden((6, 2, 70)).to(dtype)
    tap_SBT[0] = 0
    tap_SBT[1, 0, 69] = float("inf")
    tap_SBT[2, 1, 69] = float("nan")
    tap_SBT[3, 0, 8:60] = float("-inf")  # more than an int8 record keeps
    tap_SBT[4, 0, 8:60] = float("nan")
    tap_SBT[5, 0, ::2] = 0
    back_SBT = there_and_back(tap_SBT, form)
    is_damaged_SB = ~tap_SBT.isfinite().all(-1)
    assert is_damaged_SB.sum() == 4
    assert back_SBT[is_damaged_SB].isnan().all()
    assert back_SBT[~is_damaged_SB].isfinite().all()
    assert (back_SBT[tap_SBT == 0] == 0).all()


def test_an_entry_beyond_bf16_is_damage_in_int8() -> None:
    tap_RT = torch.ones(2, 16)
    tap_RT[1, 4] = torch.finfo(torch.float32).max
    back_RT = there_and_back(tap_RT, "int8")
    assert (back_RT[0] == 1).all()
    assert back_RT[1].isnan().all()


@pytest.mark.parametrize("form", PACKED)
@pytest.mark.parametrize("shape", [(1, 1, 70), (70,), (2, 1, 3, 70), (0, 2, 70)])
def test_any_leading_shape(form: TapForm, shape: tuple[int, ...]) -> None:
    back = there_and_back(torch.full(shape, 3.0), form)
    torch.testing.assert_close(back, torch.full(shape, 3.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", PACKED)
def test_any_strides(form: TapForm) -> None:
    """Neither a tap nor its packed form need lie in memory in order."""
    tap_SBT = hidden((5, 3, 70))
    chosen, wanted = TapFormat(torch.float32, form), there_and_back(tap_SBT, form)
    for order in ((0, 1, 2), (1, 0, 2), (2, 1, 0)):
        inverse = [order.index(dim) for dim in range(3)]
        strided = tap_SBT.permute(order).contiguous().permute(inverse)
        packed = chosen.pack(strided)
        assert chosen.unpack(packed.permute(order).contiguous().permute(inverse), 70).equal(wanted)
    assert chosen.unpack(packed[1:, ::2], 70).equal(wanted[1:, ::2])


def test_packing_a_bf16_tap_in_int8_again_changes_nothing() -> None:
    for width in WIDTHS:
        once = there_and_back(hidden((64, width)).bfloat16(), "int8")
        assert there_and_back(once, "int8").equal(once)


def test_packing_a_float32_tap_in_int8_again_changes_what_a_scale_is_rounded_by() -> None:
    """Where no kept entry was rounded below another: here the 8 largest are far above the rest."""
    tap_RT = torch.randn(64, 70, generator=torch.Generator().manual_seed(3))
    tap_RT[:, 20:28] += 100
    once = there_and_back(tap_RT, "int8")
    torch.testing.assert_close(there_and_back(once, "int8"), once, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_are_harmless_in_int8(dtype: torch.dtype) -> None:
    """An entry as large as the smallest kept one is 127 scales, so that it does not matter which is kept."""
    tap_RT = torch.linspace(-1, 1, 70).repeat(2, 1)
    tap_RT[0, 4:64:5], tap_RT[1] = -3.0, 0.7
    back_RT = there_and_back(tap_RT.to(dtype), "int8")
    bf16 = torch.tensor(0.7).bfloat16().float()
    # In float32 the kept ones of equal entries are rounded to bf16.
    wanted = torch.where((back_RT[1] - bf16).abs() < 1e-6, bf16, tap_RT[1].to(dtype).float())
    torch.testing.assert_close(back_RT[1].float(), wanted, rtol=2e-7, atol=0)
    assert ((back_RT[1].float() - bf16).abs() < 1e-6).sum() == (70 if dtype == torch.bfloat16 else 8)
    torch.testing.assert_close(back_RT[0, 4:64:5].float(), torch.full((12,), -3.0), rtol=2e-7, atol=0)


def test_positions_to_the_last_of_the_widest() -> None:
    tap_RT = torch.zeros(1, 65_535)
    tap_RT[0, [0, 32_767, 32_768, 65_534]] = torch.tensor([1.0, -2.0, 4.0, 8.0])
    assert there_and_back(tap_RT, "int8").equal(tap_RT)


@pytest.mark.parametrize(
    ("name", "start", "stop"),
    [("values", 0, 70), ("scale", 70, 74), ("positions", 74, 90), ("kept", 90, 106)],
)
def test_every_byte_of_an_int8_record_counts(name: str, start: int, stop: int) -> None:
    """A flipped bit of any part changes the tap; the padding says nothing."""
    int8, tap_RT = TapFormat(torch.float32, "int8"), hidden((1, 70))
    packed_RP, back_RT = int8.pack(tap_RT), there_and_back(tap_RT, "int8")
    kept, _ = reference(tap_RT[0].tolist())
    for byte in range(start, stop):
        if name == "positions" and byte % 2:
            continue  # the high byte of a position beyond the width
        flipped = packed_RP.clone()
        flipped[0, byte] ^= 1
        assert int8.unpack(flipped, 70).equal(back_RT) == (name == "values" and byte in kept), byte
    padded = packed_RP.clone()
    padded[0, 106:] = 255
    assert padded.shape == (1, 112)
    assert int8.unpack(padded, 70).equal(back_RT)


@pytest.mark.parametrize("form", ["float32", "bf16"])
def test_an_unpacked_form_is_left_alone(form: TapForm) -> None:
    tap_SBT = torch.randn(2, 2, 6, dtype=torch.bfloat16)
    plain = TapFormat(torch.bfloat16, form)
    assert plain.unpack(plain.pack(tap_SBT), 6) is tap_SBT
    assert (plain.packed_dtype, plain.token_bytes(6)) == (torch.bfloat16, 12)
