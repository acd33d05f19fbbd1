"""TransformerEngine's modules: every loss term and every gradient is the same at every layout, and right.

The tests are like `tests/step/test_layouts.py`, with TransformerEngine's own Python over the kernels of `kernels.py`.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.harness.ranks import run_on_ranks
from tests.oracle.case import (
    FULL_BLOCK,
    FULL_UNIFORM,
    SELECTIVE,
    Case,
    assert_equal,
    expected,
    small,
)
from tests.oracle.reference import STUDENT, TEACHER, Terms
from tests.transformer_engine import IMAGE, needs_python
from tests.transformer_engine.steps import modules_step

pytestmark = needs_python

TIED = {"student": replace(STUDENT, tied=True), "teacher": replace(TEACHER, tied=True)}
LAYOUTS = {
    "1x1": Case(),
    "tp2": Case(tp=2),
    "tp2-sp": Case(tp=2, sequence_parallel=True),
    "tp4-sp": Case(tp=4, sequence_parallel=True),
    "dp2": Case(dp=2),
    "cp2": Case(cp=2),
    "pp2": Case(pp=2),
    "pp2-tp2-sp": Case(pp=2, tp=2, sequence_parallel=True),
    "pp2-vpp3": Case(pp=2, vpp=3),
    "packed": Case(packed=True),
    "full-block": Case(recompute=FULL_BLOCK),
    "full-uniform-tp2-sp": Case(tp=2, sequence_parallel=True, recompute=FULL_UNIFORM),
    "pp2-full-uniform": Case(pp=2, recompute=FULL_UNIFORM),
    "selective-tp2-sp": Case(tp=2, sequence_parallel=True, recompute=SELECTIVE),
    "tied": Case(tp=2, **TIED),
    "pp2-tied": Case(pp=2, **TIED),
    "pp2-tp2-sp-live": Case(pp=2, tp=2, sequence_parallel=True, terms=Terms(live=True)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_terms_and_gradients_do_not_depend_on_the_layout(name: str) -> None:
    case = small(replace(LAYOUTS[name], transformer_impl="transformer_engine"))
    wanted = expected(case)
    for result, kinds in run_on_ranks(modules_step, case.layout, {"case": case}, image=IMAGE):
        assert_equal(result, wanted)
        assert {"TELayerNormColumnParallelLinear", "TERowParallelLinear"} <= kinds
        assert not {"RowParallelLinear", "WrappedTorchNorm"} & kinds
