"""The parts of a step that run inside TransformerEngine's FP8 context, and the parts that do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
from megatron.core.transformer.mlp import MLP

from megatron_fdd.losses.objective import Objective
from megatron_fdd.step.teacher.tap_format import TapFormat
from tests.harness.ranks import run_on_ranks
from tests.oracle.case import Case, join, schedule_step
from tests.transformer_engine import IMAGE, needs_python
from tests.transformer_engine.steps import PLAIN, fp8

pytestmark = needs_python


def places(case: Case) -> dict[str, set[bool]]:
    """Return, on every rank, for each part of a step whether it ran inside the context."""
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    seen: dict[str, set[bool]] = {"student": set(), "teacher": set(), "losses": set(), "taps": set()}

    def watched(function: Callable[..., Any], name: str | None) -> Callable[..., Any]:
        def call(self: Any, *arguments: Any, **keywords: Any) -> Any:
            whose = name or ("teacher" if not self.linear_fc1.weight.requires_grad else "student")
            seen[whose].add(FP8GlobalStateManager.is_fp8_enabled())
            return function(self, *arguments, **keywords)

        return call

    chunks, _, steps = join(case)
    with (
        patch.object(MLP, "forward", watched(MLP.forward, None)),
        patch.object(Objective, "inner", watched(Objective.inner, "losses")),
        patch.object(Objective, "final", watched(Objective.final, "losses")),
        patch.object(TapFormat, "pack", watched(TapFormat.pack, "taps")),
    ):
        schedule_step(case, chunks, steps)
    return seen


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("recipe", ["delayed", "tensorwise"])
@pytest.mark.parametrize("who", ["student", "teacher", "both"])
def test_layers_are_inside_as_told_and_losses_never(stages: int, recipe: str, who: str) -> None:
    case = replace(PLAIN, pp=stages)
    if who != "teacher":
        case = replace(case, student_options=fp8(recipe))
    if who != "student":
        case = replace(case, teacher_options=fp8("tensorwise"))
    for seen in run_on_ranks(places, case.layout, {"case": case}, image=IMAGE):
        assert seen["student"] == {who != "teacher"}
        assert seen["teacher"] == {who != "student"}
        assert seen["losses"] | seen["taps"] == {False}
