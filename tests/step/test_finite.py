"""What is read before a save: weights, and what the optimizer keeps of each."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_fdd.step.finite import _has_other, _states


def adam(**state: torch.Tensor) -> Any:
    """An optimizer as Megatron wraps it, with this state of one weight."""
    return SimpleNamespace(optimizer=SimpleNamespace(state={"weight": {"step": 3, **state}}))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_number_that_is_not_finite(value: float) -> None:
    """An infinite second moment leaves no trace in weights and losses: its weight stands still."""
    good, bad = torch.ones(5), torch.ones(5)
    bad[3] = value
    assert not _has_other(_states(adam(exp_avg=good, exp_avg_sq=good)))
    assert _has_other(_states(adam(exp_avg=good, exp_avg_sq=bad)))
    stub = SimpleNamespace(optimizer=None)
    chained = SimpleNamespace(chained_optimizers=[stub, adam(exp_avg_sq=good), adam(exp_avg_sq=bad)])
    assert _has_other(_states(chained))


def test_what_is_no_number_or_is_rounded_to_bytes_is_left_out() -> None:
    rounded = torch.full((4,), math.nan).to(torch.float8_e4m3fn)
    assert not _has_other(
        _states(adam(exp_avg=rounded, count=torch.ones(3, dtype=torch.int64), none=torch.ones(0)))
    )
    assert not _has_other(_states(None))
