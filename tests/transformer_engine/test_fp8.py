"""A step in FP8: what is computed in it and what is not, and that layout and recompute change nothing.

The numbers are FP8's, the products float32 ones: `kernels.py`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from tests.case import FULL_BLOCK, FULL_UNIFORM, SELECTIVE, Case, Result, relative, run_step
from tests.ranks import run_on_ranks
from tests.reference import STUDENT, TEACHER
from tests.transformer_engine import IMAGE, needs_python

pytestmark = needs_python

Options = tuple[tuple[str, Any], ...]


def fp8(recipe: str, layers_in_bf16: int = 0) -> Options:
    options: Options = (("fp8", "hybrid"), ("fp8_recipe", recipe))
    if layers_in_bf16:
        options += (("first_last_layers_bf16", True), ("num_layers_at_start_in_bf16", layers_in_bf16))
        options += (("num_layers_at_end_in_bf16", layers_in_bf16),)
    return options


# Widths and tokens that FP8 products take.
PLAIN = Case(
    transformer_impl="transformer_engine",
    student=replace(STUDENT, hidden=64, heads=16, groups=8, head_width=8, ffn=128),
    teacher=replace(TEACHER, hidden=96, heads=16, groups=16, head_width=8, ffn=128),
    length=16,
)
STUDENTS = {
    recipe: replace(PLAIN, student_options=fp8(recipe))
    for recipe in ("tensorwise", "delayed", "blockwise", "mxfp8")
}
TEACHERS = {
    recipe: replace(PLAIN, teacher_options=fp8(recipe)) for recipe in ("tensorwise", "blockwise", "mxfp8")
}
BOTH = {
    recipe: replace(
        PLAIN, student_options=fp8(recipe), teacher_options=fp8(recipe.replace("delayed", "tensorwise"))
    )
    for recipe in STUDENTS
}


@cache
def step(case: Case) -> Result:
    """Of the last rank, which has every term."""
    return run_on_ranks(run_step, case.layout, {"case": case}, image=IMAGE)[-1]


def farthest(result: Result, other: Result) -> tuple[float, float]:
    """Of the terms and of the gradients: the largest difference, relative."""
    terms = [abs(value / other.means[name] - 1) for name, value in result.means.items() if value]
    gradients = [
        relative(value - other.gradients[name], other.gradients[name])
        for name, value in result.gradients.items()
    ]
    return max(terms), max(gradients)


def assert_near(result: Result, other: Result, *, terms: float, gradients: float, norms: float) -> None:
    """Noise, and no more: off by some, and no gradient as a whole longer or shorter.

    But a router's: it follows from which expert a token is sent to, and some are sent to others.

    Args:
        terms, gradients: the largest relative differences.
        norms: that of a gradient's length.
    """
    term, gradient = farthest(result, other)
    assert 1e-4 < term < terms
    assert 1e-2 < gradient < gradients
    for name, wanted in other.gradients.items():
        if "router" in name:
            continue
        assert float(result.gradients[name].norm()) == pytest.approx(float(wanted.norm()), rel=norms), name


@pytest.mark.parametrize("case", [*STUDENTS.values(), *TEACHERS.values(), *BOTH.values()])
def test_is_near_what_it_is_an_approximation_of(case: Case) -> None:
    """Random layers 10 deep make the worst of it; on real models see docs/performance.md."""
    assert_near(step(case), step(PLAIN), terms=0.03, gradients=0.4, norms=0.15)


@pytest.mark.parametrize("recipe", TEACHERS)
def test_a_teacher_in_fp8_leaves_the_student_as_it_is(recipe: str) -> None:
    assert step(TEACHERS[recipe]).means["ce"] == step(PLAIN).means["ce"]
    assert step(STUDENTS[recipe]).means["ce"] != step(PLAIN).means["ce"]


@pytest.mark.parametrize("recipe", TEACHERS)
def test_weights_in_fp8_alone_are_what_copies_of_them_would_be(recipe: str) -> None:
    beside = replace(TEACHERS[recipe], teacher_options=(*fp8(recipe), ("fp8_param", False)))
    assert farthest(step(TEACHERS[recipe]), step(beside)) == (0, 0)


EXACT = {
    "pp2": {"pp": 2},
    "full-block": {"recompute": FULL_BLOCK},
    "pp2-full-uniform": {"pp": 2, "recompute": FULL_UNIFORM},
}
# With delayed scaling a micro-batch's scales depend on those before it on the same rank.
EXACT_WITHOUT_HISTORY = {
    "pp2-vpp3": {"pp": 2, "vpp": 3},
    "dp2": {"dp": 2},
    "selective": {"recompute": SELECTIVE},
}


@pytest.mark.parametrize(
    ("recipe", "name"),
    [(recipe, name) for recipe in BOTH for name in EXACT]
    + [("tensorwise", name) for name in EXACT_WITHOUT_HISTORY],
)
def test_the_same_numbers_where_every_tensor_is_whole(recipe: str, name: str) -> None:
    layout = (EXACT | EXACT_WITHOUT_HISTORY)[name]
    terms, gradients = farthest(step(replace(BOTH[recipe], **layout)), step(BOTH[recipe]))
    assert terms <= 1e-6
    assert gradients <= 1e-5


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("recipe", BOTH)
def test_near_where_a_rank_scales_its_own_part(recipe: str, sequence_parallel: bool) -> None:
    length = 32 if recipe == "mxfp8" and sequence_parallel else PLAIN.length
    split = replace(BOTH[recipe], tp=2, sequence_parallel=sequence_parallel, length=length)
    assert_near(step(split), step(replace(PLAIN, length=length)), terms=0.03, gradients=0.4, norms=0.15)


def test_first_and_last_layers_in_bf16() -> None:
    """All of them so is no FP8 at all."""
    layers = replace(PLAIN, student_options=fp8("tensorwise", 3), teacher_options=fp8("tensorwise", 5))
    assert farthest(step(layers), step(PLAIN)) <= (1e-6, 1e-6)
    some = replace(PLAIN, student_options=fp8("tensorwise", 1))
    assert 0 < farthest(step(some), step(PLAIN))[0] < farthest(step(STUDENTS["tensorwise"]), step(PLAIN))[0]
