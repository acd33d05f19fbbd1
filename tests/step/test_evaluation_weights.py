"""Validation: Megatron's evaluation gets the weights with which its mean is over tokens, not over steps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_fdd.config import FddConfig
from megatron_fdd.step.schedule import StepHooks


def test_steps_count_by_their_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = SimpleNamespace(config=FddConfig(teacher_load="T"))
    step: Any = SimpleNamespace(objective=objective, begin_step=mock.Mock(), take_sums=mock.Mock())
    steps = StepHooks(step, mock.Mock(is_last_stage=True), None, mock.Mock(), lambda: 0, 1)
    found = iter([(torch.tensor(10.0), 1.0), (torch.tensor(30.0), 2.0)])

    def step_means(*_: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        tokens, mean = next(found)
        return tokens, {"kd": torch.tensor(mean), "share 0": torch.tensor(0.5)}

    monkeypatch.setattr("megatron_fdd.step.schedule.step_means", step_means)
    [first], [second] = (steps.run(lambda **_: [], data_iterator=None, forward_only=True) for _ in range(2))
    assert first.keys() == {"kd"}
    total, tokens = first["kd"] + second["kd"]
    assert total / tokens == 1.75
