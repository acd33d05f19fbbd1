"""Steps through TransformerEngine's modules: cases whose shapes FP8 products take, their results, and distances."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from megatron.core.utils import unwrap_model

from tests.harness.ranks import run_on_ranks
from tests.oracle.case import (
    Case,
    Result,
    join,
    relative,
    run_step,
    schedule_step,
    step_result,
)
from tests.oracle.reference import STUDENT, TEACHER
from tests.transformer_engine import IMAGE

Options = tuple[tuple[str, Any], ...]


def fp8(recipe: str, layers_in_bf16: int = 0) -> Options:
    options: Options = (("fp8", "hybrid"), ("fp8_recipe", recipe))
    if layers_in_bf16:
        options += (("first_last_layers_bf16", True), ("num_layers_at_start_in_bf16", layers_in_bf16))
        options += (("num_layers_at_end_in_bf16", layers_in_bf16),)
    return options


# Widths and counts of tokens that FP8 products take.
PLAIN = Case(
    transformer_impl="transformer_engine",
    student=replace(STUDENT, hidden=64, heads=16, groups=8, head_width=8, ffn=128),
    teacher=replace(TEACHER, hidden=96, heads=16, groups=16, head_width=8, ffn=128),
    length=16,
)


@cache
def step(case: Case) -> Result:
    """Return the result of the last rank, which has every term."""
    return run_on_ranks(run_step, case.layout, {"case": case}, image=IMAGE)[-1]


def farthest(result: Result, other: Result) -> tuple[float, float]:
    """Return the largest relative difference of the terms, and of the gradients."""
    terms = [abs(value / other.means[name] - 1) for name, value in result.means.items() if value]
    gradients = [
        relative(value - other.gradients[name], other.gradients[name])
        for name, value in result.gradients.items()
    ]
    return max(terms), max(gradients)


def assert_near(result: Result, other: Result, *, terms: float, gradients: float, norms: float) -> None:
    """Assert that two results differ only by noise: numbers differ, but the length of each gradient hardly does.

    A router's gradient is an exception: it depends on the tokens' experts, and some tokens go to other ones.

    Args:
        terms, gradients: the largest relative differences.
        norms: the largest relative difference of a gradient's length.
    """
    term, gradient = farthest(result, other)
    assert 1e-4 < term < terms
    assert 1e-2 < gradient < gradients
    for name, wanted in other.gradients.items():
        if "router" in name:
            continue
        assert float(result.gradients[name].norm()) == pytest.approx(float(wanted.norm()), rel=norms), name


def modules_step(case: Case) -> tuple[Result, set[str]]:
    """Run, on every rank, the step of `tests.oracle.case.run_step`; return also the modules that computed it."""
    chunks, teacher, steps = join(case)
    kinds = {
        type(module).__name__ for model in [*unwrap_model(chunks), teacher] for module in model.modules()
    }
    return step_result(case, chunks, schedule_step(case, chunks, steps)), kinds


KINDS: dict[str, Options] = {"sequential": (), "grouped": (("moe_grouped_gemm", True),)}
