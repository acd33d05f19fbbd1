"""The table of divergences, and total variation, which is added to it and then computed wherever the others are."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import cast
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fdd.config import FddConfig
from megatron_fdd.losses.tap import TapWindow
from megatron_fdd.losses.term import Needs, TapContext, TapTerm
from megatron_fdd.losses.terms import add_term
from megatron_fdd.ops.divergence import DIVERGENCES, Divergence, DivergenceKind, add_divergence
from megatron_fdd.ops.head_loss import LossWeights, head_loss
from megatron_fdd.ops.implementation import Implementation
from megatron_fdd.ops.linear_kl import VocabShard
from megatron_fdd.plan.context import Context
from megatron_fdd.plan.modules import check_kernels
from tests.harness.markdown import ROOT
from tests.harness.ranks import distributed
from tests.ops import added_divergence
from tests.ops.head_loss_case import reference, scaled, weights_of
from tests.ops.linear_kl_case import RankPart, error, gradients, loss, make_case, reference_gradients, tiles
from tests.oracle import reference as oracle
from tests.oracle.added_term import own_table


@pytest.fixture(autouse=True)
def table() -> Iterator[None]:
    """Restore the table after a test that adds or changes a row."""
    with patch.dict(DIVERGENCES):
        yield


@pytest.fixture
def tv() -> Iterator[None]:
    with added_divergence.known():
        yield


def test_every_divergence_has_an_oracle_a_triton_function_and_its_formula_in_the_method() -> None:
    page = (ROOT / "docs/method.md").read_text(encoding="utf-8")
    for name, kind in DIVERGENCES.items():
        assert name in oracle.DIVERGENCES
        assert oracle.DEFAULT_MIX.get(name) == kind.default_mix
        assert kind.triton is not None, name
        mix = "" if kind.default_mix is None else f" +mix {kind.default_mix}"
        assert re.search(rf"^{name} +{re.escape(kind.formula)}{mix}$", page, re.MULTILINE), name


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_door_would_let_every_built_in_one_in(name: str) -> None:
    kind = replace(DIVERGENCES.pop(name), leader=None)
    add_divergence(name, kind)
    assert DIVERGENCES[name] is kind


def half(teacher: Tensor, student: Tensor, _mix: float) -> tuple[Tensor, Tensor]:
    gap = student.exp() - teacher.exp()
    return gap**2 / 2, gap * student.exp()


def kind_of(value_and_score: object, **changes: object) -> DivergenceKind:
    fields = {"value_and_score": value_and_score, "formula": "", "explanation": ""} | changes
    return DivergenceKind(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        (cast(str, 7), kind_of(half), "name 7: use a small letter"),
        ("own", cast(DivergenceKind, half), "must be a DivergenceKind"),
        ("jsd", kind_of(half), "'jsd' exists: give yours another name"),
        ("My divergence", kind_of(half), "name 'My divergence': use a small letter"),
        ("own", kind_of(half, leader="teacher"), "leader 'teacher': .*leave it out"),
        ("own", kind_of(half, default_mix=1.0), "default_mix 1.0: it must lie between 0 and 1"),
        ("own", kind_of(lambda t, s, _: (half(t, s, 0)[0].sum(-1), s)), r"its value has the shape \[8\] or is not"),
        ("own", kind_of(lambda t, s, mix: (half(t, s, mix)[0] * mix, s)), "its value .* is not finite"),
        ("own", kind_of(lambda t, s, _: (half(t, s, 0)[0], s.exp().abs())), "score is off by up to 0"),
        ("own", kind_of(lambda t, s, _: half(t - t.mean(-1, True), s, 0)), "five columns alone .* each number"),
        ("own", kind_of(lambda t, s, _: half(t.mul_(0.5), s, 0)), "or its inputs are written to"),
        ("own", kind_of(lambda t, s, _: (s.square() / 2, s)), "shares memory .* return new tensors"),
        ("own", kind_of(lambda t, s, _: (s.sum().expand_as(s), s + 0)), "memory with an input or itself"),
        ("own", kind_of(lambda t, s, _: [x / len(s) for x in half(t, s, 0)]), "three rows alone are off by"),
        ("own", kind_of(7), r"value_and_score: it must be a function that takes \(teacher_NC"),
        ("own", kind_of(lambda t, s, _: 1 / 0), r"value_and_score fails with ZeroDivisionError: .*test_divergence.py"),
        ("own", kind_of(lambda t, s, _: half(t, s, 0)[0].sum()), "return two tensors, value and score"),
        ("own", kind_of(lambda t, s, _: half(t.float(), s.float(), 0)), "its value is torch.float32 on cpu: give a"),
        ("own", kind_of(lambda t, s, _: half(t.double(), s.double(), 0)), "dtype and device, here torch.float32"),
        ("own", kind_of(lambda t, s, _: half(t, s.detach(), 0)), "autograd cannot differentiate its value"),
        ("own", kind_of(half, formula=None), "the formula None: give it a text"),
        ("own", kind_of(half, default_mix="0.5"), "default_mix '0.5': it must lie"),
        ("own", kind_of(half, triton=half), "triton <function half .*: give a function decorated with @triton.jit"),
        ("own", kind_of(half, triton="kernels"), "triton 'kernels': give a function decorated"),
        ("own", kind_of(half, triton=SimpleNamespace(fn=half)), r"triton: .* takes \(teacher, student, mix, log_mix"),
        ("own", kind_of(lambda t, s, mix: (half(t, s, 0)[0] * mix, half(t, s, 0)[1] / 2), default_mix=0.5), "mix 0.37"),
    ],
)  # fmt: skip
def test_what_is_malformed_is_refused(name: str, kind: DivergenceKind, message: str) -> None:
    before = dict(DIVERGENCES)
    with pytest.raises(ValueError, match=message):
        add_divergence(name, kind)
    assert before == DIVERGENCES


def test_what_is_well_formed_is_not() -> None:
    add_divergence("own", kind_of(half))
    assert math.isnan(Divergence("own", mix=0.3).mix_weight), "it has none"
    assert not Divergence("own").one_sweep


def run_of(config: FddConfig) -> Context:
    return cast(Context, SimpleNamespace(config=config))


class ReadsTheDivergence(TapTerm):
    """A term beside the trajectory that asks for the layers' divergence."""

    kind, title, caption = "reads_it", "", ""

    def needs(self, _config: FddConfig) -> Needs:
        return Needs(divergence=True)

    def compute(self, window: TapWindow, _context: TapContext) -> Tensor:
        assert window.current.divergence is not None
        return window.current.divergence


def test_without_a_triton_function_triton_is_refused_and_torch_is_automatic(
    tv: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    DIVERGENCES["tv"] = replace(DIVERGENCES["tv"], triton=None)
    message = "'tv' has no Triton function: use --fdd-kernels torch"
    case = make_case(3, 20).to(torch.float32)
    part = RankPart(case, VocabShard(0, 20, None), slice(None), slice(None))
    with pytest.raises(ValueError, match=message):
        part.run(case.student, case.student_head, Divergence("tv"), implementation=Implementation("triton"))
    monkeypatch.setattr("megatron_fdd.plan.modules.is_rehearsal_wanted", lambda: False)
    config = FddConfig(teacher_load="given", kernels="triton", trajectory_divergence="tv")
    with pytest.raises(ValueError, match=message):
        check_kernels(run_of(config))
    check_kernels(run_of(replace(config, alpha=0.0)))
    check_kernels(run_of(replace(config, kernels="torch")))
    with own_table():
        add_term(ReadsTheDivergence())
        with pytest.raises(ValueError, match=message):
            check_kernels(run_of(replace(config, alpha=0.0, term=(("reads_it", 1.0),))))
    on_gpu = cast(Tensor, SimpleNamespace(is_cuda=True, dtype=torch.float32))
    assert Implementation().chosen(on_gpu, Divergence("tv")) == "torch"
    assert Implementation().chosen(on_gpu, Divergence("jsd")) == "triton"
    assert Implementation().chosen(on_gpu, None) == "triton"


PATHS = (
    tiles(5, block_rows=4),
    replace(tiles(5), skip_below=1e-2),  # no effect where there are two sweeps
    Implementation("reference"),
)
HELD = (Implementation("torch", held_logits=40), Implementation("torch"), Implementation("reference"))


def assert_per_token(part: RankPart, divergence: Divergence) -> None:
    """Compare outputs and gradients of linear_kl, in float64, for this rank's part."""
    expected, wanted = reference_gradients(part.case, divergence)
    for live, implementation in itertools.product((False, True), PATHS):
        inputs = part.inputs(live=live)
        outputs = part.run(*inputs, divergence, implementation=implementation)
        for value, of_oracle in zip(outputs, expected, strict=True):
            assert error(value, of_oracle[part.tokens]) < 1e-12, implementation
        found = gradients(loss(outputs, part.case.upstream[:, part.tokens]), *inputs[: 1 + live])
        assert error(found[0], wanted[0][part.tokens]) < 1e-12, implementation
        assert not live or error(found[1], wanted[1][part.rows]) < 1e-12, implementation


def assert_summed(part: RankPart, divergence: Divergence) -> None:
    """Compare sums and gradients of head_loss, in float64, for this rank's part."""
    case, rows = part.case, part.tokens
    whole = weights_of(case)
    leaves = [each.clone().requires_grad_() for each in (case.student, case.student_head)]
    expected = reference(case, divergence, whole, *leaves)
    wanted = gradients(scaled(expected), *leaves)
    weights = LossWeights(whole.divergence_N[rows], whole.entropy_N[rows], whole.divergence, whole.entropy)
    for live, implementation in itertools.product((False, True), HELD):
        hidden, head = part.inputs(live=live)
        result = head_loss(
            case.teacher[rows],
            hidden,
            part.heads(head, implementation),
            divergence=divergence,
            labels_N=case.labels[rows],
            weights=weights,
        )
        assert result.divergence is not None
        value = result.divergence.detach().clone()
        if part.shard.splits_tokens:
            dist.all_reduce(value)
        assert error(value, expected.divergence) < 1e-12, implementation
        found = gradients(scaled(result), *(hidden, head)[: 1 + live])
        assert error(found[0], wanted[0][rows]) < 1e-12, implementation
        assert not live or error(found[1], wanted[1][part.rows]) < 1e-12, implementation


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_an_added_divergence_is_computed_wherever_the_others_are(temperature: float, tv: None) -> None:
    case, divergence = make_case(13, 53, padded=61), Divergence("tv", temperature=temperature)
    part = RankPart(case, VocabShard(0, 53, None), slice(None), slice(None))
    assert_per_token(part, divergence)
    assert_summed(part, divergence)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@distributed(ranks=2)
def test_and_on_two_ranks(sequence_parallel: bool) -> None:
    part = RankPart.of(make_case(10, 31, padded=32), sequence_parallel=sequence_parallel)
    with added_divergence.known():
        for temperature in (1.0, 2.0):
            assert_per_token(part, Divergence("tv", temperature=temperature))
            assert_summed(part, Divergence("tv", temperature=temperature))
