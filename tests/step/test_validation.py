"""Validation: each term's mean is over its own tokens, of all steps and ranks, and the total is their weighted sum."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_fdd.config import FddConfig
from megatron_fdd.losses.objective import Objective
from megatron_fdd.losses.terms import Part, parts_of
from megatron_fdd.step.metrics import Report
from megatron_fdd.step.progress import Progress
from megatron_fdd.step.validation import Evaluation, Validation
from tests.harness.ranks import run_on_ranks
from tests.oracle.case import Case, expected, validate
from tests.oracle.reference import Terms

ALL_TOKENS = Terms(all_tokens=True, ce=0.5)
LAYOUTS = {
    "1x1": Case(terms=ALL_TOKENS),
    "dp2": Case(dp=2, terms=ALL_TOKENS),
    "pp2": Case(pp=2, terms=ALL_TOKENS),
    "tp2-sp": Case(tp=2, sequence_parallel=True, terms=ALL_TOKENS),
    "cp2": Case(cp=2, terms=ALL_TOKENS),
    "dp2-labels": Case(dp=2, terms=Terms(ce=0.5)),
}


@pytest.mark.tier("default")
@pytest.mark.parametrize("name", LAYOUTS)
def test_means_are_those_of_all_tokens_at_once(name: str) -> None:
    """Each batch is a step of its own, and has other numbers of tokens and labels than the others."""
    case = LAYOUTS[name]
    wanted = expected(case).means
    found = [means for means in run_on_ranks(validate, case.layout, {"case": case}) if means]
    assert len(found) == case.dp * case.tp * case.cp
    for means in found:
        assert wanted.keys() <= means.keys()
        for term, value in wanted.items():
            assert means[term] == pytest.approx(value, rel=1e-6), term


@pytest.fixture
def validation(monkeypatch: pytest.MonkeyPatch) -> Validation:
    """Return a validation of 0.5 ce + 2 kd, without inner layers."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    config = FddConfig(teacher_load="T", alpha=0, beta=0, kd_weight=2.0, ce_weight=0.5, tokens="all")

    def weight_of(part: Part) -> float:
        return part.term.weight(config)

    objective: Any = SimpleNamespace(parts=parts_of(config, ()), weight_of=weight_of)
    objective.unseen = partial(Objective.unseen, objective)
    return Validation(Report([objective], [""]), mock.Mock(is_last_stage=True))


def evaluate(validation: Validation, *steps: tuple[float, ...], is_cut_short: bool = False) -> Any:
    """Run steps with these counts of labels and of tokens, and these sums of ce and kd; return the means."""

    def original() -> Evaluation:
        for step in steps:
            validation.add(torch.tensor(step))
        return {}, None, is_cut_short

    means, _, _ = validation.evaluate(original)
    return None if means is None else {name: value.item() for name, value in means.items()}


def test_every_set_has_its_means_and_all_sets_have_theirs(validation: Validation) -> None:
    assert evaluate(validation, (10, 40, 30, 20), (30, 40, 10, 60)) == {"total": 2.5, "ce": 1.0, "kd": 1.0}
    assert evaluate(validation, (0, 20, 0, 40)) == {"total": 4.0, "kd": 2.0}  # no label
    means = {name: value.item() for name, value in validation.take_means().items()}
    assert means == pytest.approx({"total": 0.5 + 2 * 1.2, "ce": 1.0, "kd": 1.2})
    assert validation.take_means() == {}


def test_a_validation_without_a_token_has_no_means(validation: Validation) -> None:
    assert evaluate(validation, (0, 0, 0, 0)) == {}
    said: list[str] = []
    Progress(lambda: 3, ("ce",), say=said.append).evaluation("valid", 1, {})
    assert said == ["valid 1/3 | total -"]


def test_many_steps_add_up_exactly(validation: Validation) -> None:
    """float32 cannot count so far."""
    steps = [(2.0**24, 2.0**24, 2.0**24, 2.0**24), (1.0, 1.0, 1.0, 1.0)]
    assert evaluate(validation, *steps)["ce"] == 1.0
    assert validation._sets[0][0] == 2**24 + 1


def test_a_validation_that_ran_out_of_time_has_no_means(validation: Validation) -> None:
    evaluate(validation, (1, 1, 1, 1))
    assert evaluate(validation, (1, 1, 1, 1), is_cut_short=True) is None
    assert validation.take_means() == {}
