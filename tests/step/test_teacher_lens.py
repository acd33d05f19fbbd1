"""A lens for the teacher's inner layers on live ranks: one that does nothing, and mistakes that are noticed.

That value and gradient are right with it at any layout says tests/step/test_layouts.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
from torch import Tensor

from megatron_fdd.losses.layer_plan import Plan
from megatron_fdd.losses.lens import TeacherLens
from tests.harness.ranks import run_on_ranks
from tests.oracle import reference
from tests.oracle.case import Case, Result, assert_equal, expected, run_step, small
from tests.oracle.reference import Terms

pytestmark = pytest.mark.tier("default")

TUNED = small(Case(pp=2, terms=Terms(tuned=True)))
real_features, real_maps = TeacherLens.features, reference.random_maps


def maps_of_zeros(shape: reference.Shape) -> dict[int, tuple[Tensor, Tensor]]:
    return {block: (weight * 0, bias * 0) for block, (weight, bias) in real_maps(shape).items()}


def of_another_block(self: TeacherLens, hidden_SBT: Tensor, block: int) -> Tensor:
    return real_features(self, hidden_SBT, next(each for each in self.blocks if each != block))


def of_the_stages_pairs(self: Plan, stage: int) -> set[int]:
    """Without the block that the first tap is compared with."""
    return {self.pairs[index].teacher_block for chunk in self.chunks_on(stage) for index in chunk.pairs}


MUTATIONS: dict[str, tuple[type, str, Callable[..., Any]]] = {
    "another block's map": (TeacherLens, "features", of_another_block),
    "no map of the carried tap": (Plan, "teacher_blocks", of_the_stages_pairs),
}


def run_broken(case: Case, mutation: str) -> Result:
    """Body on every rank."""
    with patch.object(*MUTATIONS[mutation]):
        return run_step(case)


def check_broken(mutation: str) -> None:
    """The central test's check. The ranks themselves may already notice."""
    for result in run_on_ranks(run_broken, TUNED.layout, {"case": TUNED, "mutation": mutation}):
        assert_equal(result, expected(TUNED))


def run_zeros(case: Case) -> Result:
    """Body on every rank."""
    with patch.object(reference, "random_maps", maps_of_zeros):
        return run_step(case)


@pytest.mark.parametrize("pp", [1, 2])
def test_maps_of_zeros_are_the_bare_lens(pp: int) -> None:
    tuned = replace(TUNED, pp=pp)
    bare = replace(tuned, terms=replace(tuned.terms, tuned=False))
    with_zeros = run_on_ranks(run_zeros, tuned.layout, {"case": tuned})
    without = run_on_ranks(run_step, bare.layout, {"case": bare})
    for zeros, result in zip(with_zeros, without, strict=True):
        assert zeros.means == result.means
        assert all((zeros.gradients[name] == value).all() for name, value in result.gradients.items())


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_wrong_map_is_noticed(mutation: str) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception), match="trajectory|gradient|KeyError"):
        check_broken(mutation)
