"""Packed taps on a GPU: as near to the tap as on a CPU, from the same records, whichever of the two packed them."""

from __future__ import annotations

import pytest
import torch

from megatron_fdd.step.teacher.tap_format import TapForm, TapFormat

RUNS_WITHOUT_A_GPU = True
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# A scale may differ in its last bit, and a value that lies between two steps then goes to the other one.
STEPS = {"fp8": {"rtol": 2**-3, "atol": 0.0}, "int8": {"rtol": 0.01, "atol": 6.0 / 127}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", STEPS)
def test_packed_taps(form: TapForm, dtype: torch.dtype) -> None:
    tap_SBT = torch.randn(64, 2, 4090, generator=torch.Generator().manual_seed(1)).to(dtype)
    tap_SBT[..., 4089] *= 1000
    tap_SBT[3] = 0
    tap_SBT[5, 1, 7], tap_SBT[6, 0, :20] = torch.nan, torch.inf
    tap_format = TapFormat(dtype, form)
    here = tap_format.unpack(tap_format.pack(tap_SBT), 4090)
    packed = tap_format.pack(tap_SBT.to(DEVICE))
    there = tap_format.unpack(packed, 4090).cpu()
    assert there.isnan().equal(here.isnan())
    assert there.isnan().all(-1).sum() == there.isnan().any(-1).sum() == 2
    assert (there[3] == 0).all()
    torch.testing.assert_close(there, here, **STEPS[form], equal_nan=True)
    assert (there == here).sum() > 0.99 * here.isfinite().sum()
    torch.testing.assert_close(tap_format.unpack(packed.cpu(), 4090), there, rtol=0, atol=0, equal_nan=True)
