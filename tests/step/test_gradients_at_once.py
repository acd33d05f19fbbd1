"""Steps with Triton's kernels, as on a GPU: taps have their gradient from the forward pass, in blocks of tokens."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import pytest

from megatron_fdd.losses import objective
from megatron_fdd.losses.inner_pass import inner_pass
from megatron_fdd.ops.implementation import Implementation
from megatron_fdd.plan.flops import is_computed_at_once
from tests.harness.ranks import run_on_ranks
from tests.ops.interpreted import DEVICE, few_columns
from tests.oracle.case import ENDS, Case, Result, assert_equal, expected, fdd_config, run_step, small
from tests.oracle.reference import Terms

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.tier("all"),
    pytest.mark.skipif(DEVICE != "cpu", reason="ranks are on CPUs, where Triton has its interpreter alone"),
]

LAYOUTS = {
    "1x1": Case(),
    "tp2": Case(tp=2),
    "tp2-sp": Case(tp=2, sequence_parallel=True),
    "pp2-tp2-sp": Case(tp=2, pp=2, sequence_parallel=True),
    "pp2-vpp2-ends": Case(pp=2, vpp=2, terms=ENDS),
    "cp2": Case(cp=2),
    "loss-scale": Case(pp=2, loss_scale=128.0),
    "jsd-hot": Case(tp=2, terms=Terms(trajectory_kind="jsd", kd_kind="rkl", temperature=2.0, ce=0.5)),
    "detach-previous": Case(pp=2, terms=Terms(detach_previous=True)),
    "only-delta": Case(terms=Terms(alpha=0.0, kd=0.0)),
}
# Taps whose gradient is not known before the backward pass, or is computed in another way.
OTHERS = {
    "centred": Case(terms=Terms(centred=True)),
    "no-delta": Case(terms=Terms(beta=0.0)),
    "live": Case(terms=Terms(live=True)),
}


def run_in_blocks(case: Case) -> tuple[Result, int]:
    """Run, on every rank, a step that holds the logits of few tokens; count the passes that compute gradients."""
    with (
        few_columns(32),
        patch.object(Implementation, "_held_rows", lambda *_: 13),
        patch.object(objective, "inner_pass", side_effect=inner_pass) as passes,
    ):
        return run_step(case), passes.call_count


@pytest.mark.parametrize("name", [*LAYOUTS, *OTHERS])
def test_terms_and_gradients_are_the_references(name: str) -> None:
    case = replace(small((LAYOUTS | OTHERS)[name]), kernels="triton")
    wanted = expected(case)
    results = run_on_ranks(run_in_blocks, case.layout, {"case": case})
    for result, _ in results:
        assert_equal(result, wanted)
    assert any(count for _, count in results) == (name in LAYOUTS)
    assert is_computed_at_once(fdd_config(case), is_capped=False) == (name in LAYOUTS), "as the plan says"


@pytest.mark.parametrize("name", ["tap", "tokens"])
def test_draws_have_the_gradients_of_torch(name: str) -> None:
    """A step that looks at one tap and the one before it, which may lie on another stage; or at some tokens."""
    case = {
        "tap": Case(pp=2, vpp=2, sample_one_tap=True, terms=ENDS),
        "tokens": Case(tp=2, sequence_parallel=True, sample_tokens=0.5),
    }[name]
    case = small(case)
    wanted = run_on_ranks(run_step, case.layout, {"case": case})
    results = run_on_ranks(run_in_blocks, case.layout, {"case": replace(case, kernels="triton")})
    for (result, _), reference in zip(results, wanted, strict=True):
        assert_equal(result, reference)
