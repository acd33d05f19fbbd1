"""A whole step with a divergence from outside the package, against the oracle."""

from __future__ import annotations

import pytest

from tests.harness.ranks import run_on_ranks
from tests.ops import added_divergence
from tests.oracle.case import Case, Result, assert_equal, expected, run_step, small
from tests.oracle.reference import Terms

pytestmark = pytest.mark.tier("default")


def run_with_it(case: Case) -> Result:
    """Run the case on every rank, with the divergence added."""
    with added_divergence.known():
        return run_step(case)


@pytest.mark.parametrize("beta", [1.0, 0.0], ids=["linear_kl", "head_loss"])
def test_terms_and_gradients_are_the_oracles(beta: float) -> None:
    """The trajectory is computed by either operation, tensor and sequence parallel, over two stages."""
    terms = Terms(kd_kind="tv", trajectory_kind="tv", temperature=2.0, ce=0.5, beta=beta)
    case = small(Case(tp=2, pp=2, sequence_parallel=True, terms=terms))
    with added_divergence.known():
        wanted = expected(case)
    for result in run_on_ranks(run_with_it, case.layout, {"case": case}):
        assert_equal(result, wanted)
