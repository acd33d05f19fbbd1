"""The fused losses on a GPU with their real tiles, compared with the float64 reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_fdd.ops.delta import capped_change, delta_cosine, head_grams
from megatron_fdd.ops.head_extras import HeadExtras
from megatron_fdd.ops.head_loss import head_loss
from megatron_fdd.ops.linear_kl import Divergence, Implementation, linear_kl
from tests.ops.head_loss_case import FACTOR, scaled, weights_of
from tests.ops.head_loss_case import reference as head_reference
from tests.ops.inner_case import Inner, gradients_of, leaves_of, make_layers, reference_of
from tests.ops.linear_kl_case import (
    KINDS,
    Case,
    capped,
    error,
    gradients,
    loss,
    make_case,
    parameter_of_ddp,
    reference_gradients,
)

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# For values and for gradients, relative to the norm. With bf16 heads, weights are rounded to bf16 before their sum.
TOLERANCES = {torch.float32: (2e-6, 1e-5), torch.bfloat16: (2e-6, 6e-3)}
# Tokens, vocabulary, its padded size, widths of teacher and student.
ODD = (77, 1003, 1024, (72, 40))
SEVERAL_TILES = (130, 17001, 17024, (128, 64))
LARGE = (300, 151_936, 152_064, (256, 128))


def on_gpu(size: tuple[int, int, int, tuple[int, int]], dtype: torch.dtype) -> Case:
    num_tokens, vocab_size, padded, widths = size
    return to_gpu(make_case(num_tokens, vocab_size, padded=padded, widths=widths).to(dtype))


def to_gpu(case: Case) -> Case:
    fields = {name: getattr(case, name) for name in Case.__dataclass_fields__}
    moved = {name: each.cuda() for name, each in fields.items() if isinstance(each, Tensor)}
    for name, each in fields.items():
        if isinstance(each, HeadExtras) and each.bias_W is not None:
            moved[name] = replace(each, bias_W=each.bias_W.cuda())
    return replace(case, **moved)


def assert_linear_kl(
    case: Case, divergence: Divergence | None, implementation: Implementation, *, live: bool
) -> None:
    hidden, head = case.student.clone().requires_grad_(), case.student_head.clone().requires_grad_(live)
    heads = case.heads(head, implementation)
    outputs = linear_kl(case.teacher, hidden, heads, divergence=divergence, labels_N=case.labels)
    leaves = (hidden, head) if live else (hidden,)
    ours = gradients(loss(outputs, case.upstream), *leaves)
    keep = (divergence is not None, True, True, True)
    expected, expected_gradients = reference_gradients(case, divergence, keep)
    in_value, in_gradient = TOLERANCES[case.student_head.dtype]
    for value, wanted in zip(outputs, expected, strict=True):
        assert value is None or error(value, wanted) < in_value
    for gradient, wanted in zip(ours, expected_gradients, strict=False):
        assert error(gradient, wanted) < in_gradient


def assert_head_loss(case: Case, divergence: Divergence | None, implementation: Implementation) -> None:
    weights = weights_of(case)
    hidden, head = case.student.clone().requires_grad_(), case.student_head.clone().requires_grad_()
    heads = case.heads(head, implementation)
    ours = head_loss(
        case.teacher, hidden, heads, divergence=divergence, labels_N=case.labels, weights=weights
    )
    double = case.to(torch.float64)
    leaves = [x.clone().requires_grad_() for x in (double.student, double.student_head)]
    expected = head_reference(double, divergence, weights, *leaves)
    in_value, in_gradient = TOLERANCES[case.student_head.dtype]
    for value, wanted in zip(ours, expected, strict=True):
        assert value is None or error(value, wanted) < in_value
    wanted_gradients = gradients(scaled(expected), *leaves)
    for gradient, wanted in zip(gradients(scaled(ours), hidden, head), wanted_gradients, strict=True):
        assert error(gradient, wanted) < in_gradient


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", KINDS)
def test_every_divergence(kind: str, temperature: float, implementation: str, dtype: torch.dtype) -> None:
    case, divergence = on_gpu(ODD, dtype), Divergence(kind, temperature=temperature)
    for live in (False, True):
        assert_linear_kl(case, divergence, Implementation(implementation, tile_size=256), live=live)
    assert_head_loss(case, divergence, Implementation(implementation))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("size", [SEVERAL_TILES, LARGE], ids=["17k", "152k"])
def test_large_vocabularies(size: tuple, implementation: str, dtype: torch.dtype) -> None:
    case = on_gpu(size, dtype)
    assert_linear_kl(case, Divergence("fkl"), Implementation(implementation), live=False)
    assert_linear_kl(case, Divergence("rkl"), Implementation(implementation), live=True)
    assert_head_loss(case, Divergence("fkl"), Implementation(implementation))
    assert_head_loss(case, None, Implementation(implementation))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_a_cap_and_a_bias(implementation: str, dtype: torch.dtype) -> None:
    cases = [on_gpu(size, dtype) for size in (ODD, SEVERAL_TILES)]
    for case in (to_gpu(capped(capped(each), cap=2.5, model="student")) for each in cases):
        for kind in KINDS:
            divergence = Divergence(kind, temperature=2.0)
            assert_linear_kl(case, divergence, Implementation(implementation), live=False)
            assert_head_loss(case, divergence, Implementation(implementation))


def test_the_delta_under_a_cap() -> None:
    """In products of bf16 parts; the reference is float64."""
    case = to_gpu(capped(on_gpu((200, 20_000, 20_032, (256, 128)), torch.bfloat16)))
    heads = case.heads()
    grams = head_grams(heads)
    earlier_NT, student_ND = case.teacher.float().flip(0), (case.student.float() * 0.3).requires_grad_()
    change = capped_change(earlier_NT, case.teacher.float(), heads, grams)
    cosine = delta_cosine(change, student_ND, None, None, grams)
    changes = [
        case.logits("teacher") - case.logits("teacher").flip(0),
        student_ND.double() @ case.student_head[: case.vocab_size].double().T,
    ]
    changes = [each - each.mean(1, keepdim=True) for each in changes]
    assert (cosine - torch.nn.functional.cosine_similarity(*changes, dim=1)).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_a_trained_heads_gradient_added_at_once(implementation: str, dtype: torch.dtype) -> None:
    case = on_gpu(SEVERAL_TILES, dtype)
    weights = replace(weights_of(case), factor=torch.tensor(FACTOR, device="cuda"))
    hidden, head = case.student.clone().requires_grad_(), parameter_of_ddp(case.student_head)
    heads = case.heads(head, Implementation(implementation))
    result = head_loss(
        case.teacher, hidden, heads, divergence=Divergence(), labels_N=case.labels, weights=weights
    )
    scaled(result).backward()
    double = case.to(torch.float64)
    leaves = [x.clone().requires_grad_() for x in (double.student, double.student_head)]
    wanted = gradients(scaled(head_reference(double, Divergence(), weights, *leaves)), *leaves)
    tolerance = TOLERANCES[dtype][1]
    assert error(hidden.grad, wanted[0]) < tolerance
    assert error(head.main_grad - 3.0, wanted[1]) < tolerance


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_the_same_result_every_time(implementation: str) -> None:
    case = on_gpu(SEVERAL_TILES, torch.bfloat16)

    def once() -> tuple[Tensor, ...]:
        hidden, head = case.student.clone().requires_grad_(), case.student_head.clone().requires_grad_()
        heads = case.heads(head, Implementation(implementation))
        outputs = linear_kl(case.teacher, hidden, heads, divergence=Divergence())
        return gradients(loss(outputs, case.upstream), hidden, head)

    first, second = once(), once()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("centred", [False, True], ids=["logprob", "centred"])
def test_cosines_of_differences(centred: bool) -> None:
    """The case is like a late layer after a training: both models change little, and in similar ways."""
    case = on_gpu((500, 20_000, 20_000, (1024, 512)), torch.bfloat16)
    grams = head_grams(case.heads())
    deltas = [(x.float() * 0.3).requires_grad_() for x in (case.teacher, case.student)]
    heads = [head.double() for head in (case.teacher_head, case.student_head)]
    wide = [delta.detach().double().requires_grad_() for delta in deltas]
    changes = [delta @ head.T for delta, head in zip(wide, heads, strict=True)]
    lse = None
    if centred:
        changes = [change - change.mean(1, keepdim=True) for change in changes]
    else:
        lse = [change.detach().logsumexp(1) - 9 for change in changes]
        changes = [change - c[:, None] for change, c in zip(changes, lse, strict=True)]
        lse = [c.float() for c in lse]
    wanted = torch.nn.functional.cosine_similarity(*changes, dim=1)
    cosine = delta_cosine(*deltas, *(lse or (None, None)), grams)
    assert (cosine - wanted).abs().max() < 1e-5
    (gradient,) = torch.autograd.grad(cosine.sum(), deltas[1])
    (wanted_gradient,) = torch.autograd.grad(wanted.sum(), wide[1])
    assert error(gradient, wanted_gradient) < 1e-4


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("skip_below", [0.0, 1e-9])
@pytest.mark.parametrize("kind", KINDS)
def test_inner_layers(kind: str, skip_below: float, dtype: torch.dtype) -> None:
    """The gradient of divergences and deltas from the forward pass, in blocks of 50 tokens."""
    layers = make_layers(3, 130, 17_001, padded=17_024)
    inner = Inner(tuple(layer.to(dtype) for layer in layers), Divergence(kind, temperature=2.0))
    few = Implementation("triton", held_logits=2 * 50 * 17_024, skip_below=skip_below)
    heads = to_gpu(inner.layers[0]).heads(implementation=few)
    students = [leaf.detach().cuda().requires_grad_() for leaf in leaves_of(inner, torch.float32)]
    total, sums = inner.run(heads, students)
    wanted_total, wanted_sums, wanted = reference_of(inner)
    assert error(total.cpu(), wanted_total) < 2e-5
    for ours, reference in zip(sums, wanted_sums, strict=True):
        for value, wanted_value in zip(ours, reference, strict=True):
            assert value is None or error(value.cpu(), wanted_value) < 2e-5
    for gradient, wanted_gradient in zip(gradients_of(total, students), wanted, strict=True):
        assert error(gradient.cpu(), wanted_gradient) < max(1e-4, TOLERANCES[dtype][1])
