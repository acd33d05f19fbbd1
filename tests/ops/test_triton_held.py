"""Held logits with the Triton kernels, compared with the float64 reference: see tests/ops/test_triton.py."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from megatron_fdd.ops.divergence import DIVERGENCES
from megatron_fdd.ops.head_loss import head_loss
from megatron_fdd.ops.implementation import Implementation
from megatron_fdd.ops.linear_kl import Divergence
from tests.ops import added_divergence
from tests.ops.head_loss_case import reference, scaled, weights_of
from tests.ops.interpreted import DEVICE, few_columns
from tests.ops.linear_kl_case import KINDS, Case, capped, error, gradients, make_case

pytest.importorskip("triton")
from megatron_fdd.ops.gpu import sweeps  # noqa: E402

# Where a GPU computes a NaN, NumPy in the interpreter warns.
pytestmark = [pytest.mark.filterwarnings("error::RuntimeWarning"), pytest.mark.tier("default")]
FEW = Implementation("triton", held_logits=53 * 3)  # 3 tokens of a vocabulary of 53 at a time
TOLERANCES = {torch.float32: (1e-6, 1e-6), torch.bfloat16: (1e-6, 6e-3)}


@pytest.fixture(autouse=True)
def small_programs() -> Iterator[None]:
    with few_columns():
        yield


def assert_matches(case: Case, divergence: Divergence | None, implementation: Implementation = FEW) -> None:
    """Compare sums, and the gradients of hidden states and head."""
    leaves = [x.double().clone().requires_grad_() for x in (case.student, case.student_head)]
    expected = reference(case, divergence, weights_of(case), *leaves)
    weights = weights_of(case)
    on_device = replace(
        weights,
        divergence_N=weights.divergence_N.to(DEVICE, torch.float32),
        entropy_N=weights.entropy_N.to(DEVICE, torch.float32),
    )
    hidden, head = (x.detach().to(DEVICE).clone().requires_grad_() for x in (case.student, case.student_head))
    heads = case.heads(head, implementation)
    extras = [
        each if each.bias_W is None else replace(each, bias_W=each.bias_W.to(DEVICE))
        for each in (case.teacher_extras, case.student_extras)
    ]
    heads = replace(
        heads,
        teacher_WT=case.teacher_head.to(DEVICE),
        teacher_extras=extras[0],
        student_extras=extras[1],
    )
    ours = head_loss(
        case.teacher.to(DEVICE),
        hidden,
        heads,
        divergence=divergence,
        labels_N=case.labels.to(DEVICE),
        weights=on_device,
    )
    in_value, in_gradient = TOLERANCES[case.student_head.dtype]
    for value, wanted in zip(ours, expected, strict=True):
        assert (value is None) == (wanted is None)
        assert value is None or error(value.cpu(), wanted) < in_value
    wanted_gradients = gradients(scaled(expected), *leaves)
    for gradient, of_reference in zip(gradients(scaled(ours), hidden, head), wanted_gradients, strict=True):
        assert error(gradient.cpu(), of_reference) < in_gradient


@pytest.mark.parametrize("dtype", TOLERANCES, ids=["float32", "bf16"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", [*KINDS, None])
def test_sums_and_gradients(kind: str | None, temperature: float, dtype: torch.dtype) -> None:
    case = make_case(5, 53, padded=70, widths=(20, 17)).to(dtype)
    case.student_head[53:] = case.teacher_head[53:] = math.nan  # never read, not even to be multiplied by 0
    assert_matches(case, None if kind is None else Divergence(kind, temperature=temperature))


@pytest.mark.tier("all")
@pytest.mark.parametrize("kind", KINDS)
def test_caps_and_biases(kind: str) -> None:
    case = capped(make_case(5, 53, padded=70, widths=(20, 17)).to(torch.float32))
    both = capped(case, model="student", cap=2.5)
    assert_matches(case, Divergence(kind))
    assert_matches(both, Divergence(kind, temperature=2.0))
    assert_matches(both, Divergence(kind))


def test_a_divergence_that_brings_its_own_function() -> None:
    with added_divergence.known():
        assert "tv" in DIVERGENCES
        assert_matches(make_case(5, 53, padded=70).to(torch.float32), Divergence("tv"))


@pytest.mark.parametrize("vocab_size", [2, 7, 8, 9, 16, 64, 65])
def test_vocabularies_of_any_size(vocab_size: int) -> None:
    """A row may end anywhere in the columns that are read at a time; the memory up to the next row is its own."""
    case = make_case(3, vocab_size, padded=vocab_size + 3, widths=(20, 17)).to(torch.float32)
    with patch.dict(TOLERANCES, {torch.float32: (3e-6, 1e-6)}):  # few columns have small sums
        for kind in ("fkl", "srkl"):
            assert_matches(case, Divergence(kind, temperature=2.0), Implementation("triton"))


@pytest.mark.parametrize("temperature", [1.0, 0.2])
@pytest.mark.parametrize("kind", ["fkl", "rkl"])
def test_logits_that_leap(kind: str, temperature: float) -> None:
    """Logits rise by hundreds along a row, or fall: exponentials relative to the earlier peak would overflow."""
    case = make_case(8, 75, widths=(20, 17)).to(torch.float32)
    for head, hidden in ((case.teacher_head, case.teacher), (case.student_head, case.student)):
        head[:, 0] = 2.0 * torch.arange(75) ** 2 / 30
        hidden[:, 0] = torch.linspace(-1, 1, 8)
    with torch.no_grad():
        case.teacher_head[:, 0] *= 0.98
    leaves = [x.double().clone().requires_grad_() for x in (case.student, case.student_head)]
    divergence = Divergence(kind, temperature=temperature)
    expected = reference(case, divergence, weights_of(case), *leaves)
    assert expected.divergence is not None
    assert expected.divergence.isfinite()
    with patch.dict(TOLERANCES, {torch.float32: (1e-5, 1e-4)}):  # logits of 370 are rounded
        assert_matches(case, divergence)


def launches(case: Case, divergence: Divergence) -> list[str]:
    """Return the names of the kernels of one call, in order."""
    seen: list[str] = []
    run = sweeps.Launch.run

    def recorded(launch: sweeps.Launch) -> None:
        seen.append(launch.kernel.fn.__name__)
        run(launch)

    with patch.object(sweeps.Launch, "run", recorded):
        assert_matches(case, divergence, Implementation("triton"))
    return seen


def test_one_launch_a_pass() -> None:
    """However many columns a row has."""
    case = make_case(5, 53, padded=70).to(torch.float32)
    assert launches(case, Divergence("fkl")) == ["statistics_kernel", "gradient_kernel"]
    assert launches(case, Divergence("jsd")) == ["statistics_kernel", "second_kernel", "gradient_kernel"]


def equal_models(case: Case) -> Case:
    return replace(case, teacher=case.student, teacher_head=case.student_head)


@pytest.mark.tier("all")
@pytest.mark.parametrize("kind", KINDS)
def test_equal_models_give_zero(kind: str) -> None:
    case = make_case(5, 60, widths=(20, 17)).to(torch.float32)
    hidden = case.student.to(DEVICE).clone().requires_grad_()

    def run(of: Case) -> tuple[Tensor, Tensor]:
        heads = of.heads(of.student_head.to(DEVICE), FEW)
        heads = replace(heads, teacher_WT=of.teacher_head.to(DEVICE))
        given = weights_of(of)
        weights = replace(given, divergence_N=given.divergence_N.float().to(DEVICE))
        result = head_loss(
            of.teacher.to(DEVICE), hidden, heads, divergence=Divergence(kind), labels_N=None, weights=weights
        )
        return result.loss, gradients(result.loss, hidden)[0]

    loss, gradient = run(equal_models(case))
    assert loss.abs() <= 5e-6
    assert gradient.norm() <= 1e-5 * run(case)[1].norm()
