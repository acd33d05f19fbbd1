"""A stored teacher teaches what a live one does: every term and gradient, at every layout, against the reference."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from megatron_fdd.step.teacher.stored import read_ranges
from tests.harness.ranks import run_on_ranks
from tests.oracle.case import (
    ALL_EXPERTS,
    ENDS,
    Case,
    assert_equal,
    expected,
    run_step,
    small,
)
from tests.oracle.reference import STUDENT, TEACHER, Terms

pytestmark = pytest.mark.tier("default")

# The logits of such a teacher have a bias and a soft cap, which bends most of them.
CAPPED = replace(TEACHER, cap=3.0, head_bias=True)
EVERYTHING = Terms(ce=0.5, kd=0.7, alpha=1.3, beta=0.9)
LAYOUTS = {
    "1x1": Case(),
    "tp2": Case(tp=2, terms=EVERYTHING),
    "tp2-sp": Case(tp=2, sequence_parallel=True),
    "pp2": Case(pp=2),
    "pp4-ends": Case(pp=4, terms=ENDS),
    "pp2-vpp2-tp2-sp": Case(tp=2, pp=2, vpp=2, sequence_parallel=True),
    "cp2": Case(cp=2),
    "tp2-cp2-sp": Case(tp=2, cp=2, sequence_parallel=True),
    "pp2-vpp3-cp2": Case(pp=2, vpp=3, cp=2),
    "dp2-all-tokens": Case(dp=2, terms=Terms(all_tokens=True, ce=0.5)),
    "ep2-dp2": Case(dp=2, ep=2, teacher_ep=2, **ALL_EXPERTS),
    "pp2-ep2-dp2": Case(pp=2, dp=2, ep=2, teacher_ep=2, **ALL_EXPERTS),
    "tp2-cp2": Case(tp=2, cp=2),
    "packed": Case(packed=True),
    "packed-tp2": Case(packed=True, tp=2),
    "packed-tp2-pp2-sp": Case(packed=True, tp=2, pp=2, sequence_parallel=True),
    "pp2-live-centred": Case(pp=2, terms=Terms(live=True, centred=True)),
    "tuned-lens-tp2-sp": Case(tp=2, sequence_parallel=True, terms=Terms(tuned=True)),
    "teacher-lacks-added-tokens": Case(tp=2, teacher=replace(TEACHER, vocab=47)),
    "no-norm": Case(tp=2, terms=Terms(lens_norm=False)),
    "only-kd": Case(pp=2, terms=Terms(alpha=0.0, beta=0.0)),
    "capped": Case(teacher=CAPPED, terms=Terms(temperature=2.0, centred=True)),
    "capped-cp2": Case(cp=2, teacher=CAPPED),
    "capped-tp2-sp": Case(tp=2, sequence_parallel=True, teacher=replace(CAPPED, vocab=47), terms=EVERYTHING),
    "capped-pp2-live": Case(pp=2, teacher=CAPPED, terms=Terms(live=True)),
    "capped-packed-tp2": Case(tp=2, teacher=CAPPED, terms=Terms(tuned=True), packed=True),
    "tied": Case(pp=2, student=replace(STUDENT, tied=True), teacher=replace(TEACHER, tied=True)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_stored_teacher_teaches_alike_at_every_layout(name: str) -> None:
    case = small(replace(LAYOUTS[name], stored="float32"))
    wanted = expected(case)
    for result in run_on_ranks(run_step, case.layout, {"case": case}):
        assert_equal(result, wanted)


@pytest.mark.parametrize(("length", "tensor", "shares"), [(12, 3, (4, 4, 4)), (12, 5, (12,) * 5)])
def test_tensor_parallel_ranks_deal_what_they_read(length: int, tensor: int, shares: tuple[int, ...]) -> None:
    """Also without sequence parallelism; a sample that cannot be cut equally is read whole."""
    context = SimpleNamespace(rank=lambda: 1)
    found = [
        read_ranges(
            2 * length,
            SimpleNamespace(context_group=context, context_size=2, tensor_rank=rank, tensor_size=tensor),
        )
        for rank in range(tensor)
    ]
    assert tuple(sum(last - first for first, last in ranges) for ranges in found) == shares
    own = set(range(length // 2, length // 2 + length))
    assert set().union(*(range(*each) for ranges in found for each in ranges)) == own
