"""States that no sound teacher gives, and padding, which may be anything."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_fdd.teach.soundness import check_states


def states() -> tuple[Tensor, Tensor]:
    """Return states [S, B, T], and which are of real tokens: 5, 3 and none of a row."""
    is_token_SB = torch.arange(6)[:, None] < torch.tensor([5, 3, 0])
    return torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(1)), is_token_SB


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.0])
def test_padding_may_be_anything(value: float) -> None:
    tap_SBT, is_token_SB = states()
    tap_SBT[~is_token_SB] = value
    check_states(tap_SBT, is_token_SB)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("token", "row"), [(0, 0), (4, 0), (2, 1)])
def test_a_real_token_must_be_finite(value: float, token: int, row: int) -> None:
    tap_SBT, is_token_SB = states()
    tap_SBT[token, row, 2] = value
    with pytest.raises(ValueError, match="a hidden state is not finite: its weights are damaged"):
        check_states(tap_SBT, is_token_SB)


def test_a_text_of_zeros_is_refused_and_a_token_of_zeros_is_not() -> None:
    tap_SBT, is_token_SB = states()
    tap_SBT[0] = 0
    check_states(tap_SBT, is_token_SB)
    tap_SBT[:3, 1] = 0
    with pytest.raises(ValueError, match="a block gives nothing but zeros for a text"):
        check_states(tap_SBT, is_token_SB)
