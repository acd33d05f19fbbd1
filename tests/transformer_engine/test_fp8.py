"""A step in FP8: which parts are computed in it, and that layout and recompute change nothing.

The numbers are FP8's, and the products are in float32 (see `kernels.py`).
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.oracle.case import FULL_BLOCK, FULL_UNIFORM, SELECTIVE, Case
from tests.transformer_engine import needs_python
from tests.transformer_engine.steps import PLAIN, assert_near, farthest, fp8, step

pytestmark = needs_python


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


@pytest.mark.parametrize("case", [*STUDENTS.values(), *TEACHERS.values(), *BOTH.values()])
def test_is_near_what_it_is_an_approximation_of(case: Case) -> None:
    """Ten random layers are the worst case; docs/performance.md has real models."""
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
# With delayed scaling, a micro-batch's scales depend on the earlier micro-batches of the same rank.
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


@pytest.mark.tier("all")
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("recipe", BOTH)
def test_near_where_a_rank_scales_its_own_part(recipe: str, sequence_parallel: bool) -> None:
    length = 32 if recipe == "mxfp8" and sequence_parallel else PLAIN.length
    split = replace(BOTH[recipe], tp=2, sequence_parallel=sequence_parallel, length=length)
    assert_near(step(split), step(replace(PLAIN, length=length)), terms=0.03, gradients=0.4, norms=0.15)


def test_first_and_last_layers_in_bf16() -> None:
    """If all layers are in bf16, nothing is in FP8."""
    layers = replace(PLAIN, student_options=fp8("tensorwise", 3), teacher_options=fp8("tensorwise", 5))
    assert farthest(step(layers), step(PLAIN)) <= (1e-6, 1e-6)
    some = replace(PLAIN, student_options=fp8("tensorwise", 1))
    assert 0 < farthest(step(some), step(PLAIN))[0] < farthest(step(STUDENTS["tensorwise"]), step(PLAIN))[0]
