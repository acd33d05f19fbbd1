"""When the gradient of inner layers can be computed in the forward pass: all that comes back to them is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_fdd.config import FddConfig
from megatron_fdd.losses import terms
from megatron_fdd.losses.inner_pass import knows_all_gradients
from megatron_fdd.losses.tap import TapWindow
from megatron_fdd.losses.term import Needs, TapContext, TapTerm
from megatron_fdd.losses.terms import TERMS, Trajectory, add_term, tap_terms
from megatron_fdd.ops.head_extras import HeadExtras
from megatron_fdd.ops.implementation import Implementation
from megatron_fdd.ops.inner_loss import is_worth_it
from megatron_fdd.ops.linear_kl import Divergence
from tests.ops.linear_kl_case import make_case


class Own(TapTerm):
    """A term of a plug-in with the needs that a test gives it."""

    kind, title, unit, caption = "own", "own", "nats", "own"
    wanted = Needs()

    def needs(self, _config: FddConfig) -> Needs:
        return self.wanted

    def compute(self, window: TapWindow, context: TapContext) -> Tensor:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("wanted", "known"),
    [(Needs(teacher=True), True), (Needs(lse=True), False), (Needs(teacher=True, divergence=True), False)],
)
def test_terms_of_plug_ins(monkeypatch: pytest.MonkeyPatch, wanted: Needs, known: bool) -> None:
    """What such a term makes of a divergence or a log-sum-exp, nobody knows before the backward pass."""
    monkeypatch.setattr(terms, "TERMS", [*TERMS])
    monkeypatch.setattr(Own, "wanted", wanted)
    add_term(Own())
    config = FddConfig(teacher_load="T", term=(("own", 1.0),))
    assert knows_all_gradients(tap_terms(config), config) == known


def test_without_log_sum_exps_there_is_nothing_to_gain() -> None:
    """Each layer alone has its gradient from the forward pass then."""
    whole = FddConfig(teacher_load="T")
    assert knows_all_gradients(tap_terms(whole), whole)
    for config in (replace(whole, delta="centred"), replace(whole, beta=0.0)):
        assert not knows_all_gradients(tap_terms(config), config)
    assert not knows_all_gradients([Trajectory()], whole)


def test_the_device_and_the_heads_decide() -> None:
    case = make_case(3, 5).to(torch.float32)
    heads = case.heads(implementation=Implementation("triton"))
    assert is_worth_it(heads, Divergence())
    assert not is_worth_it(case.heads(), Divergence()), "a CPU"
    assert not is_worth_it(replace(heads, student_extras=HeadExtras(cap=2.0)), Divergence())
    assert not is_worth_it(replace(heads, teacher_extras=HeadExtras(cap=2.0)), Divergence())
    assert not is_worth_it(replace(heads, student_WD=heads.student_WD.requires_grad_()), Divergence())
    with torch.no_grad():
        assert not is_worth_it(heads, Divergence())
