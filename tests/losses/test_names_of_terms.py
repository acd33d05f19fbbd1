"""The table of terms, and a kind of term from a test in everything that reports terms."""

from __future__ import annotations

import argparse
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from megatron_fdd.config import FddConfig, add_fdd_args
from megatron_fdd.losses import terms
from megatron_fdd.losses.chunk_loss import StepSettings
from megatron_fdd.losses.features import TeacherFeatures
from megatron_fdd.losses.layer_plan import ChunkPlan
from megatron_fdd.losses.lens import Lens, TeacherLens
from megatron_fdd.losses.objective import Objective
from megatron_fdd.losses.pairs import LayerPair
from megatron_fdd.losses.sampling import StepDraw
from megatron_fdd.losses.tap import TapWindow, TokenWeights
from megatron_fdd.losses.term import Needs, TapContext, TapTerm
from megatron_fdd.losses.terms import (
    TERMS,
    active_terms,
    add_term,
    check_terms,
    first_tap,
    needs_of,
    parts_of,
)
from megatron_fdd.ops.head_grams import StepGrams
from megatron_fdd.ops.linear_kl import VocabShard

PAIRS = (LayerPair(1, 2), LayerPair(2, 4))


def distil(**values: Any) -> FddConfig:
    return FddConfig(teacher_load="T", **values)


class Length(TapTerm):
    """A kind of term from outside the package."""

    kind = "length"
    title = "difference of lengths"
    caption = "How much longer one is."

    def compute(self, window: TapWindow, _context: TapContext) -> Tensor:
        return window.current.features.student_MD.sum()


@pytest.fixture
def own_term(monkeypatch: pytest.MonkeyPatch) -> Length:
    """Put the kind in the table for one test."""
    monkeypatch.setattr(terms, "TERMS", own := [*TERMS])
    add_term(Length())
    assert len(own) == len(TERMS) + 1
    return cast(Length, own[-1])


def test_every_weight_switches_a_term_on() -> None:
    """Try every flag that is the weight of a term."""
    flags = add_fdd_args(argparse.ArgumentParser())._actions
    weights = [flag.dest.removeprefix("fdd_") for flag in flags if (flag.help or "").startswith("weight of ")]
    assert len(weights) >= 4
    off = cast(dict[str, Any], dict.fromkeys(weights, 0.0))
    found = [active_terms(distil(**{**off, weight: 1.0})) for weight in weights]
    assert {term.kind for (term,) in found} == {term.kind for term in TERMS}


def test_parts_of_a_run_in_their_order() -> None:
    names = [part.name for part in parts_of(distil(ce_weight=1.0), PAIRS)]
    assert names == ["ce", "kd", "trajectory s1:t2", "trajectory s2:t4", "delta s2:t4"]
    assert [part.count for part in parts_of(distil(), PAIRS)] == [1, 1, 2, 2, 1]


def test_the_cross_entropy_is_measured_with_the_final_logits() -> None:
    assert [part.name for part in parts_of(distil(alpha=0, beta=0), PAIRS)] == ["ce", "kd"]
    assert "ce" not in [part.name for part in parts_of(distil(kd_weight=0), PAIRS)]


def test_needs_are_those_of_all_terms() -> None:
    whole, centred = needs_of(distil()), needs_of(distil(delta="centred", alpha=0))
    assert whole.teacher
    assert whole.divergence
    assert whole.lse
    assert whole.grams
    assert centred.grams
    assert not centred.lse
    assert not centred.divergence
    assert not needs_of(distil(alpha=0, beta=0, kd_weight=0, ce_weight=1)).teacher
    assert (first_tap(distil()), first_tap(distil(alpha=0))) == (0, 1)


@pytest.mark.usefixtures("own_term")
def test_an_own_term_has_its_parts_and_makes_the_first_tap_count() -> None:
    config = distil(alpha=0, term=(("length", 0.5),))
    assert [part.name for part in parts_of(config, PAIRS)][-2:] == ["length s1:t2", "length s2:t4"]
    assert first_tap(config) == 0
    assert "length" not in {term.kind for term in active_terms(distil())}


@pytest.mark.parametrize("kind", ["kd", "two words", "", "a=b", "a.b", "_own", "train"])
def test_a_name_that_cannot_be_is_refused(kind: str) -> None:
    before = list(TERMS)
    term = type("Named", (Length,), {"kind": kind})()
    with pytest.raises(ValueError, match="give this one another name|use one word"):
        add_term(term)
    assert before == TERMS


@pytest.mark.parametrize(
    "kind",
    [
        "total",
        "valid",
        "share",
        "iteration",
        "tokens",
        "grad_norm",
        "seconds",
        "by_tap",
        "sharded_state_dict",
    ],
)
def test_a_word_of_the_metrics_file_or_of_a_module_is_no_name(kind: str) -> None:
    with pytest.raises(ValueError, match=f"a term '{kind}' exists already"):
        add_term(type("Named", (Length,), {"kind": kind})())


def test_a_sum_takes_one_number_for_each_row() -> None:
    ones_N = torch.ones(3)
    context = TapContext(distil(), cast(Any, None), TokenWeights(ones_N, ones_N), cast(Any, None))
    assert context.sum(ones_N).item() == 3
    with pytest.raises(ValueError, match="one number for each row"):
        context.sum(ones_N[:, None])


def test_the_order_of_terms_is_that_of_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plug-in that adds them in another order on another rank would join the sums of two terms."""
    monkeypatch.setattr(terms, "TERMS", own := [*TERMS])
    for kind in ("b", "c", "a"):
        add_term(type("Named", (Length,), {"kind": kind})())
    assert [term.kind for term in own[len(TERMS) :]] == ["a", "b", "c"]


class OwnStatistics(Length):
    """A term that reads the log-sum-exps of its own tap."""

    def needs(self, _config: FddConfig) -> Needs:
        return Needs(lse=True)

    def compute(self, window: TapWindow, context: TapContext) -> Tensor:
        assert window.current.statistics is not None
        return context.sum(window.current.statistics.student_lse_N)


def test_a_term_that_compares_nothing_has_its_log_sum_exps_whatever_is_drawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(terms, "TERMS", [*TERMS])
    add_term(OwnStatistics())
    config = distil(alpha=0, beta=0, kd_weight=0, sample_one_tap=True, term=(("length", 1.0),))
    shard, chunk = VocabShard(0, 7, None), ChunkPlan((0, 1), None, None, is_first=True, is_last=True)
    lens = TeacherLens(Lens(torch.randn(7, 4), None))
    objective = Objective(config, PAIRS, chunk, shard, StepGrams(), lens)
    hidden = [torch.randn(3, 1, 4, requires_grad=True) for _ in PAIRS]
    features = TeacherFeatures(None, {0: torch.randn(3, 1, 4), 1: torch.randn(3, 1, 4)})
    weights = TokenWeights(torch.ones(3), torch.ones(3))
    for tap in (0, 1):
        draw = StepDraw(tap=tap, factor=2, with_previous=False)
        objective.begin_step(StepSettings(draw=draw))
        loss, _ = objective.inner(
            hidden, None, Lens(torch.randn(7, 4), None), features, draw.rows(weights, 1)
        )
        assert [*loss.sums] == [f"length {PAIRS[tap].name}"]


NOTHING = {"alpha": 0, "beta": 0, "kd_weight": 0}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            NOTHING,
            r"weights of all terms are 0 \(--fdd-ce-weight, .*--fdd-term\), so that nothing is trained",
        ),
        ({"layers": 1}, "delta compares .* needs at least 2, there is 1: raise --fdd-layers.*--fdd-beta"),
        ({"layer_pairs": ((3, 5),)}, "needs at least 2, there is 1"),
        (
            {"term": (("lenght", 1.0),)},
            "--fdd-term lenght=1: must name .*; 'lenght' is none of ce, .*, length; .* --fdd-plugin$",
        ),
        ({"term": (("delta", 2.0),)}, "--fdd-term delta=2: give this weight with --fdd-beta"),
        ({"teacher_load": None}, "no teacher: give .*--teacher-load"),
        ({**NOTHING, "teacher_load": None, "term": (("length", 1.0),)}, "no teacher"),
    ],
)
@pytest.mark.usefixtures("own_term")
def test_a_run_that_has_no_sense_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_terms(FddConfig(**{"teacher_load": "T", **values}))


@pytest.mark.usefixtures("own_term")
def test_terms_that_can_be_computed_pass() -> None:
    check_terms(distil())
    check_terms(distil(**NOTHING, layers=1, term=(("length", 1.0),)))
    check_terms(FddConfig(**NOTHING, ce_weight=1))
