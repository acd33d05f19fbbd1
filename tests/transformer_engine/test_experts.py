"""Mixtures of experts through TransformerEngine's modules: one expert after the other, or all multiplied together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.harness.ranks import run_on_ranks
from tests.oracle.case import (
    ALL_EXPERTS,
    FULL_UNIFORM,
    STUDENT_EXPERTS,
    TEACHER_EXPERTS,
    Case,
    assert_equal,
    expected,
    small,
)
from tests.transformer_engine import IMAGE, needs_python
from tests.transformer_engine.steps import KINDS, assert_near, farthest, fp8, modules_step, step

pytestmark = needs_python

MODULES = {
    "sequential": {"SequentialMLP", "TERowParallelLinear"},
    "grouped": {"TEGroupedMLP", "TERowParallelGroupedLinear"},
}
EXPERTS = Case(transformer_impl="transformer_engine", **ALL_EXPERTS)
EP2: dict[str, Any] = {"dp": 2, "ep": 2, "teacher_ep": 2}


def idle(case: Case) -> Case:
    """Return the case with so many experts for so few tokens that some experts get none."""
    student, teacher = (replace(shape, experts=24) for shape in (case.student, case.teacher))
    return replace(case, student=student, teacher=teacher, micro_batches=1)


LAYOUTS = {
    "1x1": EXPERTS,
    "ep2": replace(EXPERTS, **EP2),
    "tp2-sp": replace(EXPERTS, tp=2, sequence_parallel=True),
    "full-uniform": replace(EXPERTS, recompute=FULL_UNIFORM),
    "idle": idle(EXPERTS),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_terms_and_gradients_do_not_depend_on_the_layout(name: str, kind: str) -> None:
    """The gradients include the router's balancing loss."""
    case = small(replace(LAYOUTS[name], student_options=KINDS[kind], teacher_options=KINDS[kind]))
    wanted = expected(case)
    without = [key for key, gradient in wanted.gradients.items() if "experts" in key and not gradient.any()]
    assert bool(without) == (name == "idle")
    for result, kinds in run_on_ranks(modules_step, case.layout, {"case": case}, image=IMAGE):
        assert_equal(result, wanted)
        assert MODULES[kind] <= kinds


# Widths that FP8 products take; nobody can choose how many tokens an expert gets.
WIDTHS: dict[str, Any] = {"heads": 16, "head_width": 8, "ffn": 64}
PLAIN = replace(
    EXPERTS,
    student=replace(STUDENT_EXPERTS, hidden=64, groups=8, **WIDTHS),
    teacher=replace(TEACHER_EXPERTS, hidden=96, groups=16, **WIDTHS),
    length=16,
)
RECIPES = ("tensorwise", "delayed", "blockwise", "mxfp8")


def in_fp8(recipe: str, kind: str) -> Case:
    """Return a case with student and teacher in FP8; the teacher has no scales for delayed scaling."""
    teacher = fp8(recipe.replace("delayed", "tensorwise"))
    return replace(PLAIN, student_options=fp8(recipe) + KINDS[kind], teacher_options=teacher + KINDS[kind])


@pytest.mark.tier("all")
@pytest.mark.parametrize(
    ("recipe", "layout"),
    [*((recipe, {}) for recipe in RECIPES), ("tensorwise", EP2), ("mxfp8", EP2)],
)
def test_fp8_is_near_what_it_is_an_approximation_of(recipe: str, layout: dict[str, Any]) -> None:
    """The distance is larger than without experts, because some tokens go to other experts."""
    result = step(replace(in_fp8(recipe, "grouped"), **layout))
    assert_near(result, step(PLAIN), terms=0.06, gradients=0.8, norms=0.3)


@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_gives_the_same_numbers_with_a_pipeline_and_recompute(recipe: str) -> None:
    case = in_fp8(recipe, "grouped")
    terms, gradients = farthest(step(replace(case, pp=2, recompute=FULL_UNIFORM)), step(case))
    assert terms <= 1e-6
    assert gradients <= 1e-5


@pytest.mark.tier("all")
@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_of_experts_multiplied_together_is_that_of_one_after_the_other(recipe: str) -> None:
    sequential, grouped = (step(idle(in_fp8(recipe, kind))) for kind in KINDS)
    assert farthest(grouped, sequential) <= (1e-6, 1e-6)
