"""The central promise: every loss term and every gradient is the same at every layout, and right.

Each case runs the package's own forward step through Megatron's schedule and DDP, and compares with the plain
float64 reference of tests/oracle/reference.py.
"""

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
    small,
)
from tests.oracle.reference import STUDENT, TEACHER, Terms

pytestmark = pytest.mark.tier("default")

TIED = replace(STUDENT, tied=True)
OTHER_VOCABULARY = replace(TEACHER, vocab=47)
EVERYTHING = Terms(ce=0.5, kd=0.7, alpha=1.3, beta=0.9)

# Taps at the first and the last layer of a stage, and stages without a tap: 6 layers are 2+2+1+1 at pp4.
SPREAD = Terms(pairs=((1, 1), (5, 9)))
PIPELINES = {
    "pp2": Case(pp=2),
    "pp3": Case(pp=3, micro_batches=5),
    "pp4": Case(pp=4, micro_batches=6),
    "pp4-far-apart": Case(pp=4, terms=SPREAD),
    "pp4-ends": Case(pp=4, terms=ENDS),
    "pp4-early-taps": Case(pp=4, terms=Terms(pairs=((1, 1), (2, 2)))),
    "pp2-tp2": Case(tp=2, pp=2),
    "pp2-tp2-sp": Case(tp=2, pp=2, sequence_parallel=True),
    "pp2-dp2": Case(pp=2, dp=2),
    "pp2-tied": Case(pp=2, student=replace(STUDENT, tied=True), teacher=replace(TEACHER, tied=True)),
    "pp2-full-block": Case(pp=2, recompute=FULL_BLOCK),
    "pp2-full-uniform": Case(pp=2, recompute=FULL_UNIFORM),
    "pp2-loss-scale": Case(pp=2, loss_scale=128.0),
    "pp2-vpp3": Case(pp=2, vpp=3),
    "pp2-vpp2-ends": Case(pp=2, vpp=2, terms=ENDS),
    "pp2-vpp2-tp2-sp": Case(tp=2, pp=2, vpp=2, sequence_parallel=True),
    "pp2-vpp2-dp2": Case(pp=2, vpp=2, dp=2, micro_batches=8),
    "pp2-vpp3-far-apart": Case(pp=2, vpp=3, terms=SPREAD),
    "pp2-vpp2-no-delta": Case(pp=2, vpp=2, terms=Terms(beta=0.0)),
    "pp4-vpp2": Case(
        pp=4,
        vpp=2,
        micro_batches=8,
        student=replace(STUDENT, num_layers=8),
        terms=Terms(pairs=((2, 2), (3, 6), (7, 9))),
    ),
    "pp2-live-tied": Case(pp=2, student=replace(STUDENT, tied=True), terms=Terms(live=True)),
    "pp2-live-tp2-sp": Case(tp=2, pp=2, sequence_parallel=True, terms=Terms(live=True)),
    "pp2-live-dp2": Case(pp=2, dp=2, terms=Terms(live=True)),
    "pp2-live-scale": Case(pp=2, loss_scale=128.0, terms=Terms(live=True, lens_norm=False)),
    "pp2-vpp3-live": Case(pp=2, vpp=3, terms=Terms(live=True)),
    "pp2-vpp2-cp2-live-detach-previous": Case(
        pp=2, vpp=2, cp=2, terms=Terms(live=True, detach_previous=True)
    ),
    "pp2-vpp2-cp2-live-detach-previous-centred": Case(
        pp=2, vpp=2, cp=2, terms=Terms(live=True, detach_previous=True, centred=True)
    ),
    "pp4-live-no-head-loss": Case(pp=4, terms=Terms(live=True, kd=0.0)),
    "pp2-vpp2-tp2-sp-tuned-lens": Case(tp=2, pp=2, vpp=2, sequence_parallel=True, terms=Terms(tuned=True)),
    "pp4-nothing-at-the-end": Case(pp=4, terms=Terms(kd=0.0)),
}

CONTEXTS = {
    "cp2": Case(cp=2),
    "cp3": Case(cp=3),
    "tp2-cp2": Case(tp=2, cp=2),
    "tp2-cp2-sp": Case(tp=2, cp=2, sequence_parallel=True),
    "pp2-cp2": Case(pp=2, cp=2),
    "pp2-vpp3-cp2": Case(pp=2, vpp=3, cp=2),
    "cp2-dp2": Case(cp=2, dp=2),
    "cp2-full-uniform": Case(cp=2, recompute=FULL_UNIFORM),
    "cp2-selective": Case(cp=2, recompute=SELECTIVE),
    "pp2-cp2-live": Case(pp=2, cp=2, terms=Terms(live=True)),
    "cp2-all-tokens": Case(cp=2, terms=Terms(all_tokens=True, ce=0.5)),
    "dp2-all-tokens": Case(dp=2, terms=Terms(all_tokens=True, ce=0.5)),
    "packed": Case(packed=True),
    "packed-tp2-sp": Case(packed=True, tp=2, sequence_parallel=True),
    "packed-pp2": Case(packed=True, pp=2),
    "packed-pp2-vpp3": Case(packed=True, pp=2, vpp=3),
    "packed-tp2-pp2-sp": Case(packed=True, tp=2, pp=2, sequence_parallel=True),
    "packed-dp2": Case(packed=True, dp=2),
    "packed-full-block": Case(packed=True, recompute=FULL_BLOCK),
    "packed-selective": Case(packed=True, recompute=SELECTIVE),
}

LAYOUTS = (
    PIPELINES
    | CONTEXTS
    | {
        "1x1": Case(),
        "tp2": Case(tp=2),
        "tp3": Case(tp=3),
        "tp4": Case(tp=4),
        "tp2-sp": Case(tp=2, sequence_parallel=True),
        "tp3-sp": Case(tp=3, sequence_parallel=True),
        "tp4-sp": Case(tp=4, sequence_parallel=True),
        "dp2": Case(dp=2),
        "tp2-dp2": Case(tp=2, dp=2),
        "tp2-dp2-sp": Case(tp=2, dp=2, sequence_parallel=True),
        "full-block": Case(recompute=FULL_BLOCK),
        "full-uniform": Case(recompute=FULL_UNIFORM),
        "selective-tp2-sp": Case(tp=2, sequence_parallel=True, recompute=SELECTIVE),
        "full-uniform-tp2-sp": Case(tp=2, sequence_parallel=True, recompute=FULL_UNIFORM),
        "loss-scale": Case(tp=2, loss_scale=128.0),
        "tied": Case(tp=2, student=TIED),
        "tied-both": Case(tp=2, sequence_parallel=True, student=TIED, teacher=replace(TEACHER, tied=True)),
        # 50 tokens in 4 slices of 52 rows would leave 2 in the last; 9 tokens leave whole slices empty.
        "empty-slices": Case(tp=4, student=replace(STUDENT, vocab=9), teacher=replace(TEACHER, vocab=9)),
        "teacher-lacks-added-tokens": Case(tp=2, teacher=OTHER_VOCABULARY),
    }
)

# Soft caps of the logits that bend most of them.
_TEACHER, _STUDENT = replace(TEACHER, cap=3.0), replace(STUDENT, cap=2.5)
_BOTH = {"student": _STUDENT, "teacher": _TEACHER}
CAPPED = {
    "teacher-pp2-vpp2-tp2-sp": Case(tp=2, pp=2, vpp=2, sequence_parallel=True, teacher=_TEACHER),
    "teacher-cp2-live": Case(cp=2, teacher=_TEACHER, terms=Terms(live=True, centred=True)),
    "tp2": Case(tp=2, terms=replace(EVERYTHING, temperature=2.0, centred=True), **_BOTH),
    "tp2-sp-live": Case(
        tp=2, sequence_parallel=True, terms=replace(EVERYTHING, live=True, kd_kind="jsd"), **_BOTH
    ),
    "pp2-live": Case(pp=2, terms=replace(EVERYTHING, live=True, trajectory_kind="rkl"), **_BOTH),
    "pp2-vpp2-tp2-sp": Case(tp=2, pp=2, vpp=2, sequence_parallel=True, terms=EVERYTHING, **_BOTH),
    "pp2-live-detach-previous": Case(pp=2, terms=Terms(live=True, detach_previous=True), **_BOTH),
    "cp2-student": Case(cp=2, terms=EVERYTHING, student=_STUDENT),
    "no-norm": Case(terms=replace(EVERYTHING, lens_norm=False), **_BOTH),
    "selective-tp2-sp": Case(tp=2, sequence_parallel=True, recompute=SELECTIVE, **_BOTH),
}

OPTIONS = {
    "everything": EVERYTHING,
    "rkl-jsd": Terms(kd_kind="rkl", trajectory_kind="jsd"),
    "sfkl-srkl-hot": Terms(kd_kind="sfkl", trajectory_kind="srkl", temperature=2.0, mix=0.3),
    "hot-fkl": Terms(temperature=2.0, ce=0.5),
    "no-norm": Terms(lens_norm=False),
    "live": Terms(live=True),
    "live-centred": Terms(live=True, centred=True),
    "centred": Terms(centred=True),
    "detach-previous": Terms(detach_previous=True),
    "detach-previous-centred": Terms(detach_previous=True, centred=True),
    "live-detach-previous": Terms(live=True, detach_previous=True),
    "live-detach-previous-centred": Terms(live=True, detach_previous=True, centred=True),
    "all-tokens": Terms(all_tokens=True, ce=0.5),
    "only-delta": Terms(alpha=0.0, kd=0.0),
    "only-trajectory": Terms(beta=0.0, kd=0.0),
    "only-kd": Terms(alpha=0.0, beta=0.0),
    "only-ce": Terms(alpha=0.0, beta=0.0, kd=0.0, ce=1.0),
    "first-and-last": Terms(pairs=((1, 1), (6, 10))),
    "tuned-lens": Terms(tuned=True),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_terms_and_gradients_do_not_depend_on_the_layout(name: str) -> None:
    case = small(LAYOUTS[name])
    wanted = expected(case)
    for result in run_on_ranks(run_step, case.layout, {"case": case}):
        assert_equal(result, wanted)


@pytest.mark.parametrize("name", CAPPED)
def test_capped_logits(name: str) -> None:
    case = small(CAPPED[name])
    wanted = expected(case)
    for result in run_on_ranks(run_step, case.layout, {"case": case}):
        assert_equal(result, wanted)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_works_across_stages(name: str) -> None:
    case = Case(pp=3, terms=OPTIONS[name])
    wanted = expected(case)
    for result in run_on_ranks(run_step, case.layout, {"case": case}):
        assert_equal(result, wanted)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_equals_the_reference(name: str, sequence_parallel: bool) -> None:
    case = small(Case(tp=2, sequence_parallel=sequence_parallel, terms=OPTIONS[name]))
    wanted = expected(case)
    for result in run_on_ranks(run_step, case.layout, {"case": case}):
        assert_equal(result, wanted)
