"""A whole step with terms from outside the package, one of which learns, compared with the oracle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_fdd.losses import sampling
from megatron_fdd.losses.sampling import Sampler
from tests.harness.ranks import run_on_ranks
from tests.oracle import reference
from tests.oracle.added_term import expected_with_terms, known
from tests.oracle.case import (
    ENDS,
    Case,
    Result,
    assert_equal,
    fdd_config,
    join,
    run_step,
    schedule_step,
    small,
    step_result,
)
from tests.oracle.reference import STUDENT, Terms

pytestmark = pytest.mark.tier("default")

BOTH = (("fixed_mse", 0.7), ("learned_mse", 1.3))
ALONE = Terms(alpha=0.0, beta=0.0, kd=0.0)

LAYOUTS = {
    "1x1": Case(),
    "tp2": Case(tp=2),
    "tp2-sp": Case(tp=2, sequence_parallel=True),
    "pp2": Case(pp=2),
    "pp2-vpp2": Case(pp=2, vpp=2, terms=ENDS),
    "pp2-tp2-sp": Case(tp=2, pp=2, sequence_parallel=True, loss_scale=128.0),
    "cp2": Case(cp=2),
    "dp2-all-tokens": Case(dp=2, terms=Terms(all_tokens=True)),
    "alone": Case(pp=2, terms=ALONE),
    "one-width": Case(teacher=STUDENT, terms=Terms(pairs=((2, 3), (4, 5)))),
}


def run_with_them(case: Case) -> Result:
    """Run a case on every rank, with the example's terms."""
    with known():
        return run_step(case)


@pytest.mark.parametrize("name", LAYOUTS)
def test_terms_and_gradients_are_the_oracles(name: str) -> None:
    """The gradients are those of the student and of the projections."""
    case = replace(small(LAYOUTS[name]), own_terms=BOTH)
    wanted = expected_with_terms(case)
    learned = [name for name in wanted.gradients if name.startswith("fdd_terms.learned_mse.")]
    assert len(learned) == len(case.terms.pairs)
    for result in run_on_ranks(run_with_them, case.layout, {"case": case}):
        assert_equal(result, wanted)
        assert not result.means or result.means.keys() >= {"fixed_mse", "share learned_mse"}


real_batches, real_scores = reference.random_batches, sampling.random_scores


def unmasked(*arguments: int) -> list[dict[str, Tensor]]:
    """Return the usual random batches, in which every token counts: two halves make the whole."""
    masks = ("loss_mask", "token_mask")
    return [
        batch | {name: torch.ones_like(batch[name]) for name in masks} for batch in real_batches(*arguments)
    ]


def other_half(*arguments: Any) -> Tensor:
    return 1 - real_scores(*arguments)


def run_draws(case: Case, iterations: Sequence[int]) -> list[Result]:
    """Run, on every rank, steps with one tap each, with half of the tokens and with the other half."""
    now, results = [0], []
    with known(), patch.object(reference, "random_batches", unmasked):
        chunks, _, steps = join(case, {"overlap_grad_reduce": True}, iteration=lambda: now[0])
        for scores in (real_scores, other_half):
            with patch.object(sampling, "random_scores", scores):
                for now[0] in iterations:
                    means = schedule_step(case, chunks, steps)
                    results.append(step_result(case, chunks, means))
    return results


@pytest.mark.parametrize(
    "case", [Case(pp=2, dp=2), Case(tp=2, sequence_parallel=True)], ids=["pp2-dp2", "tp2-sp"]
)
def test_the_mean_of_all_draws_is_the_whole(case: Case) -> None:
    """A step has one tap and half of the tokens; a projection whose tap is not drawn has a gradient of 0."""
    case = small(replace(case, terms=ALONE, own_terms=BOTH, sample_one_tap=True, sample_tokens=0.5))
    iterations: dict[int | None, int] = {}
    with known():
        sampler = Sampler(fdd_config(case), len(case.terms.pairs), seed=0, place=0)
    for iteration in range(50):
        iterations.setdefault(sampler.draw(iteration).tap, iteration)
    assert iterations.keys() == {0, 1, 2}
    with patch.object(reference, "random_batches", unmasked):
        wanted = expected_with_terms(case)
    arguments = {"case": case, "iterations": list(iterations.values())}
    for results in run_on_ranks(run_draws, case.layout, arguments):
        assert_equal(mean_of(results), wanted)
        for result, drawn in zip(results, 2 * list(iterations), strict=True):
            for tap in range(3):
                gradient = result.gradients[f"fdd_terms.learned_mse.{tap}.weight"]
                assert bool(gradient.any()) == (tap == drawn)


def mean_of(results: Sequence[Result]) -> Result:
    count = len(results)
    return Result(
        {name: sum(result.means[name] for result in results) / count for name in results[0].means},
        {name: sum(r.gradients[name] for r in results) / count for name in results[0].gradients},
    )


def load_without_a_projection(case: Case) -> None:
    """Load, on one rank, an incomplete state as Megatron's second try does."""
    with known():
        (chunk,) = unwrap_model(join(case)[0])
    state = chunk.state_dict()
    chunk.load_state_dict(state)
    del state["fdd_terms.learned_mse.1.weight"]
    with pytest.raises(AssertionError, match=r"not loaded: \['fdd_terms.learned_mse.1.weight'\]"):
        chunk.load_state_dict(state, strict=False)


def test_a_state_that_is_not_whole_is_not_loaded() -> None:
    case = small(Case(own_terms=BOTH))
    run_on_ranks(load_without_a_projection, case.layout, {"case": case})
