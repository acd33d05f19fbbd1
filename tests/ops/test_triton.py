"""The Triton kernels, compared with the float64 reference: in Triton's interpreter on a CPU, else on the GPU.

A program has few columns, so that a small vocabulary has several tiles and pieces. Every token is a program of its
own, so that few tokens show as much as many.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_fdd.ops.blocks import LinearKL
from megatron_fdd.ops.implementation import Implementation
from megatron_fdd.ops.linear_kl import Divergence, Heads, VocabShard, linear_kl
from tests.ops import added_divergence
from tests.ops.interpreted import DEVICE, few_columns
from tests.ops.linear_kl_case import (
    KINDS,
    Case,
    capped,
    error,
    gradients,
    loss,
    make_case,
    reference_gradients,
)

pytest.importorskip("triton")
from megatron_fdd.ops.gpu import sweeps  # noqa: E402

# Where a GPU computes a NaN, NumPy in the interpreter warns.
pytestmark = [pytest.mark.filterwarnings("error::RuntimeWarning"), pytest.mark.tier("default")]
TRITON = Implementation("triton", tile_size=16)
WIDTHS = (40, 37)
# For values and for gradients, relative to the norm. With bf16 heads, weights are rounded to bf16 before their sum.
TOLERANCES = {torch.float32: (1e-6, 1e-6), torch.bfloat16: (1e-6, 6e-3)}


@pytest.fixture(autouse=True)
def small_programs() -> Iterator[None]:
    with few_columns():
        yield


def run(case: Case, divergence: Divergence | None, *, live: bool, **options) -> tuple[LinearKL, list[Tensor]]:
    """Return outputs and, if there are tokens, the student's gradients."""
    hidden = case.student.to(DEVICE).clone().requires_grad_()
    head = case.student_head.to(DEVICE).clone().requires_grad_(live)
    teacher = options.pop("teacher", (case.teacher, case.teacher_head))
    teacher_NT, teacher_WT = (None if x is None else x.to(DEVICE) for x in teacher)
    shard, implementation = options.pop("shard", case.heads().shard), options.pop("implementation", TRITON)
    labels_N = options.pop("labels_N", case.labels)
    labels_N = None if labels_N is None else labels_N.to(DEVICE)
    extras = [
        each if each.bias_W is None else replace(each, bias_W=each.bias_W.to(DEVICE))
        for each in (case.teacher_extras, case.student_extras)
    ]
    heads = Heads(teacher_WT, head, shard, implementation, *extras)
    outputs = linear_kl(teacher_NT, hidden, heads, divergence=divergence, labels_N=labels_N, **options)
    leaves = (hidden, head) if live else (hidden,)
    grads = gradients(loss(outputs, case.upstream.to(DEVICE)), *leaves)
    return LinearKL(*(None if x is None else x.cpu() for x in outputs)), [grad.cpu() for grad in grads]


def assert_matches(
    case: Case, divergence: Divergence | None, *, live: bool, keep=(True,) * 4, **options
) -> None:
    outputs, ours = run(case, divergence, live=live, **options)
    expected, expected_gradients = reference_gradients(case, divergence, keep)
    in_value, in_gradient = TOLERANCES[case.student_head.dtype]
    for value, reference in zip(outputs, expected, strict=True):
        assert (value is None) == (reference is None)
        assert value is None or error(value, reference) < in_value
    for gradient, reference in zip(ours, expected_gradients, strict=False):
        assert gradient.dtype == case.student_head.dtype
        assert error(gradient, reference) < in_gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("live", [False, True], ids=["constant-head", "trained-head"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(kind: str, temperature: float, live: bool, dtype: torch.dtype) -> None:
    case = make_case(5, 53, padded=70, widths=WIDTHS).to(dtype)
    case.student_head[53:] = case.teacher_head[53:] = math.nan  # never read, not even to be multiplied by 0
    assert_matches(case, Divergence(kind, temperature=temperature), live=live)


@pytest.mark.tier("all")
@pytest.mark.parametrize("live", [False, True], ids=["constant-head", "trained-head"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_cap_and_a_bias_of_the_teacher(kind: str, live: bool) -> None:
    case = capped(make_case(5, 53, padded=70, widths=WIDTHS).to(torch.float32))
    assert_matches(case, Divergence(kind, temperature=2.0), live=live)
    assert_matches(capped(case, biased=False), Divergence(kind), live=live)
    assert_matches(capped(case, cap=None), Divergence(kind), live=live)


@pytest.mark.tier("all")
@pytest.mark.parametrize("live", [False, True], ids=["constant-head", "trained-head"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_cap_of_the_student(kind: str, live: bool) -> None:
    case = capped(make_case(5, 53, padded=70, widths=WIDTHS).to(torch.float32), model="student", cap=2.5)
    assert_matches(capped(case), Divergence(kind, temperature=2.0), live=live)
    assert_matches(case, Divergence(kind), live=live)
    if kind == "fkl":
        alone = {"teacher": (None, None), "needs_lse": False}
        assert_matches(case, None, live=live, keep=(False, False, False, True), **alone)


@pytest.mark.parametrize("live", [False, True], ids=["constant-head", "trained-head"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_divergence_that_brings_its_own_function(temperature: float, live: bool) -> None:
    case = make_case(5, 53, padded=70, widths=WIDTHS).to(torch.float32)
    with added_divergence.known():
        assert_matches(case, Divergence("tv", temperature=temperature), live=live)


@pytest.mark.parametrize("live", [False, True], ids=["constant-head", "trained-head"])
def test_fewer_outputs(live: bool) -> None:
    case = make_case(7, 37, padded=40, widths=(20, 24)).to(torch.float32)
    for kind, temperature in (("fkl", 1.0), ("rkl", 2.0), ("jsd", 2.0)):
        divergence = Divergence(kind, temperature=temperature)
        keep = (True, False, False, False)
        assert_matches(case, divergence, live=live, keep=keep, labels_N=None, needs_lse=False)
    assert_matches(case, Divergence("fkl"), live=live, keep=(True, True, True, False), labels_N=None)
    assert_matches(case, None, live=live, keep=(False, True, True, True))
    alone = {"teacher": (None, None)}
    assert_matches(case, None, live=live, keep=(False, False, True, True), **alone)
    assert_matches(case, None, live=live, keep=(False, False, False, True), needs_lse=False, **alone)


@pytest.mark.parametrize(
    ("num_tokens", "vocab_size", "widths"),
    [(1, 1, (20, 33)), (16, 32, (32, 64)), (21, 70, (21, 48)), (19, 17, (96, 20))],
    ids=str,
)
def test_odd_and_even_shapes(num_tokens: int, vocab_size: int, widths: tuple[int, int]) -> None:
    case = make_case(num_tokens, vocab_size, padded=vocab_size + 3, widths=widths).to(torch.float32)
    implementation = replace(TRITON, tile_size=100)
    assert_matches(case, Divergence("fkl"), live=False, implementation=implementation)
    assert_matches(case, Divergence("jsd", mix=0.3), live=True, implementation=implementation)


def test_the_models_may_have_different_dtypes() -> None:
    case = make_case(5, 30, widths=WIDTHS)
    half = case.to(torch.bfloat16)
    rounded = replace(
        case.to(torch.float32), teacher=half.teacher.float(), teacher_head=half.teacher_head.float()
    )
    outputs, _ = run(rounded, Divergence(), live=True, teacher=(half.teacher, half.teacher_head))
    assert error(outputs.divergence_N, rounded.reference(Divergence()).divergence_N) < 1e-6


@pytest.mark.parametrize("live", [False, True], ids=["constant-head", "trained-head"])
@pytest.mark.parametrize("kind", ["fkl", "srkl"])
def test_a_shard_with_labels_elsewhere(kind: str, live: bool) -> None:
    """The implementation in plain torch, which has tests on many ranks, gives what one rank of several contributes."""
    case = make_case(18, 40, padded=44, widths=WIDTHS).to(torch.float32)
    labels_N = torch.arange(18) * 5  # 0 to 85: before, inside and after the shard
    labels_N[::4] = -100
    options = {"shard": VocabShard(25, 40, None), "labels_N": labels_N}
    ours, our_gradients = run(case, Divergence(kind), live=live, **options)
    theirs, their_gradients = run(
        case, Divergence(kind), live=live, implementation=Implementation("torch"), **options
    )
    for value, reference in zip(ours, theirs, strict=True):
        assert torch.equal(value.isnan(), reference.isnan())
        assert error(value.nan_to_num(), reference.double().nan_to_num()) < 1e-6
    assert ours[-1].isnan().any(), "a label that no rank has"
    for gradient, reference in zip(our_gradients, their_gradients, strict=True):
        assert error(gradient, reference.double()) < 1e-6


@pytest.mark.parametrize("live", [False, True], ids=["constant-head", "trained-head"])
@pytest.mark.parametrize("kind", ["fkl", "rkl", "jsd"])
def test_no_tokens(kind: str, live: bool) -> None:
    case = make_case(0, 20, padded=24).to(torch.float32)
    outputs, ours = run(case, Divergence(kind, temperature=2.0), live=live)
    assert all(output.shape == (0,) for output in outputs)
    assert all(not gradient.any() for gradient in ours)


def test_a_rank_of_padding_alone_contributes_nothing() -> None:
    case = make_case(5, 20).to(torch.float32)
    for divergence in (Divergence("fkl", temperature=2.0), Divergence("jsd")):
        for body_gradient in (False, True):
            sums = sweeps_of(case, divergence, num_valid=0, body_gradient=body_gradient).softmax_sums()
            assert (sums.peak_M == -math.inf).all()
            assert not sums.mass_M.any()
            assert (sums.rows_MD is not None) == (body_gradient and divergence.one_sweep)
            assert sums.rows_MD is None or not sums.rows_MD.any()


def sweeps_of(case: Case, divergence: Divergence, *, num_valid: int, body_gradient: bool):
    request = sweeps.Request(
        shard=VocabShard(0, num_valid, None),
        divergence=divergence,
        needs_lse=True,
        has_labels=False,
        implementation=TRITON,
        body_gradient=body_gradient,
        head_gradient=False,
    )
    models = [(case.teacher, case.teacher_head), (case.student, case.student_head)]
    return sweeps.TritonSweeps(request, *([x.to(DEVICE) for x in model] for model in models))


@pytest.mark.tier("all")
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.2])
@pytest.mark.parametrize("kind", ["fkl", "rkl"])
def test_logits_that_leap_from_block_to_block(kind: str, temperature: float) -> None:
    """Logits rise by hundreds: exponentials relative to the earlier peak would overflow."""
    case = make_case(18, 75, widths=WIDTHS).to(torch.float32)
    for head, hidden in ((case.teacher_head, case.teacher), (case.student_head, case.student)):
        head[:, 0] = 2.0 * torch.arange(75) ** 2 / 30
        hidden[:, 0] = torch.linspace(-1, 1, 18)
    with torch.no_grad():
        case.teacher_head[:, 0] *= 0.98
    outputs, ours = run(case, Divergence(kind, temperature=temperature), live=False)
    expected, expected_gradients = reference_gradients(case, Divergence(kind, temperature=temperature))
    for value, reference in zip(outputs, expected, strict=True):
        assert error(value, reference) < 1e-5
    assert error(ours[0], expected_gradients[0]) < 1e-5


@pytest.mark.tier("all")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_equal_models_give_zero(kind: str, dtype: torch.dtype) -> None:
    case = make_case(5, 60, widths=WIDTHS).to(dtype)
    case = replace(case, upstream=case.upstream * torch.tensor([[1.0], [0.0], [0.0]]))
    teacher = (case.student, case.student_head)
    outputs, (gradient,) = run(case, Divergence(kind), live=False, teacher=teacher, labels_N=None)
    assert outputs.divergence_N.abs().max() <= 1e-6
    _, (unequal,) = run(case, Divergence(kind), live=False, labels_N=None)
    assert gradient.norm() <= 1e-5 * unequal.norm()


def concentrated_case() -> Case:
    """Make a case in which half of the tokens give almost all probability to the first 16 columns."""
    case = make_case(8, 80, widths=WIDTHS).to(torch.float32)
    for head, hidden in ((case.teacher_head, case.teacher), (case.student_head, case.student)):
        head[:, 0] = 0.0
        head[:16, 0] = 14.0
        hidden[:4, 0] = 1.0
        hidden[4:, 0] = 0.0
    return case


@pytest.mark.parametrize(("kind", "temperature"), [("fkl", 1.0), ("rkl", 1.0), ("fkl", 2.0)])
def test_skipped_tiles_cost_at_most_their_probabilities(kind: str, temperature: float) -> None:
    case, divergence = concentrated_case(), Divergence(kind, temperature=temperature)
    exact_outputs, (exact,) = run(case, divergence, live=False)
    outputs, (gradient,) = run(case, divergence, live=False, implementation=replace(TRITON, skip_below=1e-2))
    for ours, theirs in zip(outputs, exact_outputs, strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(gradient[:4], exact[:4])
    assert error(gradient, exact.double()) < 1e-2


def test_the_same_result_every_time() -> None:
    case = make_case(5, 53, widths=WIDTHS).to(torch.bfloat16)
    first, second = (run(case, Divergence("rkl"), live=False)[1][0] for _ in range(2))
    assert torch.equal(first, second)
