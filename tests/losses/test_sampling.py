"""Sampled tokens and taps: right on average (all draws are enumerated), and the same draw at every layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from megatron_fdd.losses import objective, sampling
from megatron_fdd.losses import tap as tap_module
from megatron_fdd.losses.sampling import Sampler
from tests.harness.ranks import run_on_ranks
from tests.oracle import reference
from tests.oracle.case import (
    ENDS,
    MICRO_BATCHES,
    Case,
    Result,
    assert_equal,
    expected,
    fdd_config,
    join,
    run_step,
    schedule_step,
    small,
    step_result,
    validate,
)
from tests.oracle.reference import Terms

pytestmark = pytest.mark.tier("default")

FAR_APART = Terms(pairs=((1, 1), (5, 9)))


# Taps.


def iterations_by_tap(case: Case) -> dict[int, int]:
    """Return for each tap the first iteration that draws it."""
    sampler = Sampler(fdd_config(case), len(case.terms.pairs), seed=0, place=0)
    found: dict[int, int] = {}
    for iteration in range(100):
        tap = sampler.draw(iteration).tap
        assert tap is not None
        found.setdefault(tap, iteration)
    return dict(sorted(found.items()))


def run_iterations(case: Case, iterations: Sequence[int]) -> list[tuple[Result, int]]:
    """Run, on every rank, a step with each iteration's draw on the same weights; return results and sweeps."""
    now = [0]
    chunks, _, steps = join(case, iteration=lambda: now[0])
    results = []
    for now[0] in iterations:
        with (
            patch.object(tap_module, "linear_kl", wraps=tap_module.linear_kl) as taps,
            patch.object(tap_module, "head_loss", wraps=tap_module.head_loss) as sums,
            patch.object(objective, "head_loss", wraps=objective.head_loss) as final,
        ):
            means = schedule_step(case, chunks, steps)
        results.append(
            (step_result(case, chunks, means), taps.call_count + sums.call_count + final.call_count)
        )
    return results


def expected_with_tap(case: Case, tap: int) -> Result:
    """Return the float64 reference of the loss with one tap, from two losses with all of their taps."""
    terms, names = case.terms, ("terms", "student", "teacher", "micro_batches")
    exact = Case(**{name: getattr(case, name) for name in names})
    pairs, num_deltas = terms.pairs, len(terms.pairs) - 1
    count = len(pairs) if terms.alpha > 0 else num_deltas
    alone = replace(terms, pairs=(pairs[tap],), alpha=terms.alpha * count / len(pairs), beta=0.0)
    result = expected(replace(exact, terms=alone))
    means = {name: count * value for name, value in result.means.items() if name.startswith("trajectory")}
    means |= {name: result.means[name] for name in ("ce", "kd", "total")}
    gradients = result.gradients
    if tap > 0 and terms.beta > 0:
        beta = terms.beta * count / num_deltas
        behind = replace(terms, pairs=pairs[tap - 1 : tap + 1], alpha=0.0, kd=0.0, ce=0.0, beta=beta)
        delta = expected(replace(exact, terms=behind))
        name = f"delta s{pairs[tap][0]}:t{pairs[tap][1]}"
        means |= {name: count * delta.means[name], "total": means["total"] + delta.means["total"]}
        gradients = {name: value + delta.gradients[name] for name, value in gradients.items()}
    zero = dict.fromkeys(expected(exact).means, 0.0)
    return Result(zero | means, gradients)


def mean_of(results: Sequence[Result]) -> Result:
    names, count = results[0].means, len(results)
    return Result(
        {name: sum(result.means[name] for result in results) / count for name in names},
        {name: sum(r.gradients[name] for r in results) / count for name in results[0].gradients},
    )


ONE_TAP = {
    "tp2": Case(tp=2),
    "tp2-sp": Case(tp=2, sequence_parallel=True, terms=Terms(ce=0.5, alpha=1.3, beta=0.7)),
    "dp2": Case(dp=2),
    "pp2": Case(pp=2),
    "pp2-vpp2-ends": Case(pp=2, vpp=2, terms=ENDS),
    "pp2-tp2-sp": Case(pp=2, tp=2, sequence_parallel=True, terms=Terms(centred=True)),
    "pp2-live": Case(pp=2, terms=Terms(live=True)),
    "pp3-only-delta": Case(pp=3, terms=Terms(alpha=0.0, detach_previous=True)),
    "pp2-only-trajectory": Case(pp=2, terms=Terms(beta=0.0, kd_kind="rkl", trajectory_kind="jsd")),
    "pp4-far-apart": Case(pp=4, terms=FAR_APART),
}


@pytest.mark.parametrize("name", ONE_TAP)
def test_every_draw_of_a_tap_is_right_and_their_mean_is_the_whole(name: str) -> None:
    case = replace(ONE_TAP[name], sample_one_tap=True)
    case = case if name == "pp2" else small(case)
    taps = iterations_by_tap(case)
    assert list(taps) == list(range(0 if case.terms.alpha > 0 else 1, len(case.terms.pairs)))
    ranks = run_on_ranks(run_iterations, case.layout, {"case": case, "iterations": list(taps.values())})
    wanted = [expected_with_tap(case, tap) for tap in taps]
    for steps in ranks:
        for (result, _), each in zip(steps, wanted, strict=True):
            assert_equal(result, each)
        assert_equal(mean_of([result for result, _ in steps]), expected(case))
    if name == "pp2":
        # The first stage has blocks 1 and 3, the second has block 4 and the final logits; a delta needs two taps.
        sweeps = [[count // MICRO_BATCHES for _, count in steps] for steps in ranks]
        assert sweeps == [[1, 2, 1], [1, 1, 2]], "what is not drawn costs no sweep"


def run_overlapped(case: Case, iterations: Sequence[int]) -> list[float]:
    """Return, on every rank, totals of steps whose gradients are reduced as soon as they exist."""
    now = [0]
    chunks, _, steps = join(case, {"overlap_grad_reduce": True}, iteration=lambda: now[0])
    totals = []
    for now[0] in iterations:
        totals += [float(means["total"]) for means in schedule_step(case, chunks, steps)]
    return totals


@pytest.mark.parametrize(
    "case",
    [Case(dp=2, terms=Terms(kd=0.0)), Case(dp=2, pp=2, terms=Terms(kd=0.0, live=True), sample_one_tap=True)],
)
def test_a_step_that_does_not_use_the_head_does_not_stop_an_overlapped_reduction(case: Case) -> None:
    """From the second step on, Megatron asserts that every parameter of a bucket had a gradient."""
    iterations = [0, 1, *iterations_by_tap(case).values()] if case.sample_one_tap else [0, 1]
    ranks = run_on_ranks(run_overlapped, case.layout, {"case": case, "iterations": iterations})
    assert [len(totals) for totals in ranks if totals] == [len(iterations)] * 2


# Tokens.


def unmasked(*arguments: int) -> list[dict[str, Tensor]]:
    """Return the usual random batches, in which every token counts: two halves make the whole."""
    batches = real_batches(*arguments)
    return [batch | {name: torch.ones_like(batch[name]) for name in MASKS} for batch in batches]


MASKS = ("loss_mask", "token_mask")
real_batches, real_scores = reference.random_batches, sampling.random_scores


def other_half(*arguments: Any) -> Tensor:
    return 1 - real_scores(*arguments)


def run_halves(case: Case, iterations: Sequence[int]) -> list[Result]:
    """Run, on every rank, each iteration with its rows, and with the remaining rows."""
    with patch.object(reference, "random_batches", unmasked):
        results = [result for result, _ in run_iterations(case, iterations)]
        with patch.object(sampling, "random_scores", other_half):
            return results + [result for result, _ in run_iterations(case, iterations)]


HALVES = {
    "tp2-sp": Case(tp=2, sequence_parallel=True),
    "dp2": Case(dp=2),
    "cp2": Case(cp=2),
    "pp2-vpp2-ends": Case(pp=2, vpp=2, terms=ENDS),
    "pp2-tp2-sp-live": Case(pp=2, tp=2, sequence_parallel=True, terms=Terms(live=True)),
    "packed-centred": Case(packed=True, terms=Terms(centred=True)),
    "pp2-one-tap": Case(pp=2, sample_one_tap=True),
}


@pytest.mark.parametrize("name", HALVES)
def test_two_halves_of_the_tokens_make_the_whole(name: str) -> None:
    case = small(replace(HALVES[name], sample_tokens=0.5))
    iterations = list(iterations_by_tap(case).values()) if case.sample_one_tap else [5]
    with patch.object(reference, "random_batches", unmasked):
        wanted = expected(case)
    for results in run_on_ranks(run_halves, case.layout, {"case": case, "iterations": iterations}):
        assert results[0].means.get("total") is None or results[0].means["total"] != pytest.approx(
            wanted.means["total"], rel=1e-4
        )
        assert_equal(mean_of(results), wanted)


def test_the_same_rows_at_every_layout() -> None:
    """Ranks that hold the same rows as one process draw the same rows."""
    sampled = Case(sample_tokens=0.25, sample_one_tap=True)
    ((alone,),) = run_on_ranks(run_iterations, sampled.layout, {"case": sampled, "iterations": [3]})
    for layout in ({"tp": 2}, {"pp": 2}, {"pp": 2, "vpp": 3}):
        case = replace(sampled, **layout)
        for ((result, _),) in run_on_ranks(run_iterations, case.layout, {"case": case, "iterations": [3]}):
            assert_equal(result, alone[0])


@pytest.mark.parametrize("layout", [{"pp": 2}, {"tp": 2, "sequence_parallel": True}])
def test_room_for_every_token_that_counts_is_exact(layout: dict[str, Any]) -> None:
    case = Case(sample_tokens=0.95, **layout)
    for result in run_on_ranks(run_step, case.layout, {"case": case}):
        assert_equal(result, expected(case))


def test_an_evaluation_looks_at_everything() -> None:
    case = Case(pp=2, sample_tokens=0.25, sample_one_tap=True)
    wanted = expected(case)
    _, means = run_on_ranks(validate, case.layout, {"case": case})
    for name, value in wanted.means.items():
        assert means[name] == pytest.approx(value, rel=1e-6), name
