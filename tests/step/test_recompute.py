"""Recomputation with a pipeline: the same terms and gradients, with taps outside the recomputed parts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.harness.ranks import run_on_ranks
from tests.oracle.case import (
    ENDS,
    FULL_BLOCK,
    FULL_UNIFORM,
    SELECTIVE,
    Case,
    assert_equal,
    expected,
    run_step,
)
from tests.oracle.reference import STUDENT, Terms

pytestmark = pytest.mark.tier("default")

# This recomputes more than the attention. Megatron recomputes norms only with TransformerEngine.
SELECTIVE_MODULES = (*SELECTIVE, ("recompute_modules", ["core_attn", "mlp"]))
ONE_LAYER = (*FULL_BLOCK[:2], ("recompute_num_layers", 1))
CASES = {
    "pp2-selective": Case(pp=2, recompute=SELECTIVE),
    "pp2-selective-modules": Case(pp=2, recompute=SELECTIVE_MODULES),
    "pp2-tp2-sp-selective": Case(tp=2, pp=2, sequence_parallel=True, recompute=SELECTIVE),
    "pp2-vpp2-full-uniform": Case(pp=2, vpp=2, recompute=FULL_UNIFORM, terms=ENDS),
    "pp2-vpp3-selective": Case(pp=2, vpp=3, recompute=SELECTIVE),
    "pp2-vpp2-full-block-tied": Case(
        pp=2, vpp=2, recompute=ONE_LAYER, student=replace(STUDENT, tied=True), terms=Terms(live=True)
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_recomputation_across_stages_changes_nothing(name: str) -> None:
    case = CASES[name]
    wanted = expected(case)
    for result in run_on_ranks(run_step, case.layout, {"case": case}):
        assert_equal(result, wanted)
