"""The Gram form of the delta, compared with its definition over the vocabulary in float64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_fdd.ops import full_precision
from megatron_fdd.ops.delta import HeadGrams, delta_cosine, head_grams
from megatron_fdd.ops.heads import Heads
from megatron_fdd.ops.linear_kl import Divergence, linear_kl
from tests.ops.delta_case import Layers, leaves, make_layers
from tests.ops.linear_kl_case import Case, error, gradients, make_case


def whole_grams(layers: Layers, *, previous: HeadGrams | None = None) -> HeadGrams:
    return head_grams(layers.earlier.heads(), previous=previous)


@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_cosine_and_gradients(dtype: torch.dtype, centred: bool, detached: bool) -> None:
    layers = make_layers(11, 53, padded=57, dtype=dtype)
    # This test computes the lse in float64, so that only the error of the Gram form counts.
    tolerance = 1e-13 if dtype == torch.float64 else 1e-5
    ours = layers.cosine(whole_grams(layers), centred=centred, detached=detached)
    reference = layers.reference(centred=centred, detached=detached)
    assert ours.dtype == dtype
    assert (ours - reference).abs().max() < tolerance / 2
    weights = torch.linspace(1, 2, 11)
    trained = leaves(layers)[detached:]
    expected = gradients((weights * reference).sum(), *trained)
    for gradient, reference_gradient in zip(
        gradients((weights * ours).sum(), *trained), expected, strict=True
    ):
        assert error(gradient, reference_gradient) < tolerance
    assert not gradient[53:].any()


@pytest.mark.parametrize("centred", [False, True])
def test_gradcheck(centred: bool) -> None:
    case = make_case(3, 9, padded=10)
    lse = [torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64) for _ in range(2)]

    def cosine(student: Tensor, student_lse: Tensor, head: Tensor) -> Tensor:
        grams = head_grams(case.heads(head))
        lse_deltas = (None, None) if centred else (lse[0], student_lse)
        return delta_cosine(case.teacher, student, *lse_deltas, grams)

    inputs = [tensor.requires_grad_() for tensor in (case.student, lse[1], case.student_head)]
    assert torch.autograd.gradcheck(cosine, inputs)


@pytest.mark.parametrize("centred", [False, True])
def test_bf16_heads_are_multiplied_in_float32(centred: bool) -> None:
    layers = make_layers(40, 300, padded=310, dtype=torch.bfloat16)
    grams = whole_grams(layers)
    assert grams.teacher_student_TD.dtype == torch.float32
    exact = [layer.to(torch.float32) for layer in (layers.earlier, layers.later)]
    cosine = Layers(*exact).cosine(grams, centred=centred)
    assert (cosine - layers.reference(centred=centred)).abs().max() < 1e-5
    (gradient,) = gradients(cosine.sum(), layers.earlier.student_head)
    assert gradient.dtype == torch.bfloat16


def test_grams_do_not_cancel() -> None:
    """With column means of 1000 a subtracted form (W' W - V m m') would lose all its digits in float32."""
    layers = make_layers(5, 64, padded=64, dtype=torch.float32)
    expected = whole_grams(layers)
    with torch.no_grad():
        layers.earlier.student_head.add_(1000)
        layers.earlier.teacher_head.add_(1000)
    shifted = whole_grams(layers)
    for name in ("teacher_teacher_TT", "teacher_student_TD", "student_student_DD"):
        assert error(getattr(shifted, name), getattr(expected, name).double()) < 1e-3


@pytest.mark.parametrize("centred", [False, True])
def test_equal_models_have_cosine_one(centred: bool) -> None:
    layers = make_layers(50, 200, padded=208, dtype=torch.float32)
    twins = [
        Case(case.student, layers.earlier.student_head, case.student, layers.earlier.student_head, *rest)
        for case, rest in (
            (layer, (layer.labels, layer.upstream, layer.vocab_size))
            for layer in (layers.earlier, layers.later)
        )
    ]
    cosine = Layers(*twins).cosine(whole_grams(Layers(*twins)), centred=centred)
    assert (1 - cosine).abs().max() <= 1e-6
    inputs = leaves(layers)[:2]
    unequal = gradients(layers.cosine(whole_grams(layers), centred=centred).sum(), *inputs)
    for gradient, other in zip(gradients(cosine.sum(), *inputs), unequal, strict=True):
        assert gradient.norm() <= 1e-5 * other.norm()


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("zero", ["teacher", "student", "both"])
def test_zero_difference_counts_as_agreement_without_gradient(zero: str, centred: bool) -> None:
    layers = make_layers(4, 30, padded=32, dtype=torch.float32)
    grams = whole_grams(layers)
    case = layers.later
    teacher, student = case.teacher.clone(), case.student.detach().clone()
    teacher_lse, student_lse = torch.ones(4), torch.ones(4)
    for name, delta, lse in (("teacher", teacher, teacher_lse), ("student", student, student_lse)):
        if zero in (name, "both"):
            delta[1], lse[1] = 0, 0
    student.requires_grad_()
    student_lse.requires_grad_(not centred)
    lse_deltas = (None, None) if centred else (teacher_lse, student_lse)
    cosine = delta_cosine(teacher, student, *lse_deltas, grams)
    assert cosine[1] == 1
    assert (cosine[[0, 2, 3]] < 0.99).all()
    reached = gradients(cosine.sum(), student, *([] if centred else [student_lse]))
    for gradient in reached:
        assert gradient.isfinite().all()
        assert not gradient[1].any()
        assert gradient[0].any()


@pytest.mark.parametrize("centred", [False, True])
def test_a_constant_shift_is_no_difference(centred: bool) -> None:
    """All logits rise by the same number: |D|^2 is rounding noise."""
    layers = make_layers(8, 40, padded=40, dtype=torch.float32)
    case = layers.later
    with torch.no_grad():
        layers.earlier.student_head[:, 0] = 0.7  # so that moving state 0 shifts every logit
    grams = whole_grams(layers)
    shift = torch.arange(1.0, 9.0) * 0.37
    student = torch.zeros(8, 7).index_copy_(1, torch.tensor([0]), shift[:, None]).requires_grad_()
    lse_deltas = (None, None) if centred else (0.7 * shift, 0.7 * shift)
    cosine = delta_cosine(case.teacher, student, *lse_deltas, grams)
    assert (cosine == 1).all()
    assert not gradients(cosine.sum(), student)[0].any()


def shifting_layers(ratio: float) -> Layers:
    """All logits of both models rise by `ratio` times the deviation of their rises over the words."""
    layers = make_layers(40, 500, padded=504, dtype=torch.float32)
    with torch.no_grad():
        for model in ("teacher", "student"):
            for state, layer in enumerate((layers.earlier, layers.later), start=1):
                getattr(layer, model)[:, 0] = state
            rise_NV = layers.logits(model, layers.later) - layers.logits(model, layers.earlier)
            getattr(layers.earlier, f"{model}_head")[:, 0] += ratio * rise_NV.std(1).mean()
    return layers


def assert_agrees(cosine: Tensor, layers: Layers, inputs: Sequence[Tensor], tolerance: float) -> None:
    reference = layers.reference(centred=False)
    assert (cosine - reference).abs().max() < 5e-5
    ours, expected = (gradients(each.sum(), *inputs) for each in (cosine, reference))
    for gradient, reference_gradient in zip(ours, expected, strict=True):
        assert error(gradient, reference_gradient) < tolerance


@pytest.mark.parametrize("ratio", [20, 66])
def test_logits_that_shift_together(ratio: float) -> None:
    layers = shifting_layers(ratio)
    assert_agrees(layers.cosine(whole_grams(layers), centred=False), layers, leaves(layers), 5e-5)


@pytest.mark.parametrize("ratio", [20, 66])
def test_logits_that_shift_together_with_their_log_sum_exps_in_float32(ratio: float) -> None:
    """As in a run with a detached lens."""
    layers = shifting_layers(ratio)
    heads = layers.earlier.heads(layers.earlier.student_head.detach())
    before, after = (
        linear_kl(layer.teacher, layer.student, heads, divergence=Divergence())
        for layer in (layers.earlier, layers.later)
    )
    cosine = delta_cosine(
        layers.later.teacher - layers.earlier.teacher,
        layers.later.student - layers.earlier.student,
        after.teacher_lse_N - before.teacher_lse_N,
        after.student_lse_N - before.student_lse_N,
        head_grams(heads),
    )
    assert_agrees(cosine, layers, leaves(layers)[:2], 2e-4)


@pytest.mark.parametrize("centred", [False, True])
def test_products_of_bf16_parts_as_on_a_gpu(centred: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads with large column means, of which nothing may be left to cancel; other products than float32's."""
    case = make_case(100, 3000, padded=3008, widths=(256, 128)).to(torch.bfloat16).to(torch.float64)
    teacher_head, student_head = case.teacher_head + 0.25, (case.student_head - 0.25).requires_grad_()
    deltas = [0.3 * case.teacher, (0.3 * case.student).requires_grad_()]
    changes = [
        delta @ head[:3000].T for delta, head in zip(deltas, (teacher_head, student_head), strict=True)
    ]
    lse = [change.detach().mean(1) + 0.1 for change in changes]
    offsets = [change.mean(1) for change in changes] if centred else lse
    changes = [change - offset[:, None] for change, offset in zip(changes, offsets, strict=True)]
    wanted = torch.nn.functional.cosine_similarity(*changes, dim=1)
    monkeypatch.setattr(full_precision, "_are_split", lambda tensor: tensor.dtype == torch.float32)
    teacher, student, *heads = (x.detach().float() for x in (*deltas, teacher_head, student_head))
    for leaf in (student, heads[1]):
        leaf.requires_grad_()
    grams = head_grams(Heads(heads[0], heads[1], case.heads().shard))
    given = (None, None) if centred else [each.float() for each in lse]
    cosine = delta_cosine(teacher, student, *given, grams)
    assert (cosine - wanted).abs().max() < 3e-6
    expected = gradients(wanted.sum(), deltas[1], student_head)
    for gradient, reference in zip(gradients(cosine.sum(), student, heads[1]), expected, strict=True):
        assert 4e-6 < error(gradient, reference) < 2.5e-5, "in float32 it is less than 4e-6"


def test_no_tokens() -> None:
    layers = make_layers(0, 30, padded=32, dtype=torch.float32)
    cosine = layers.cosine(whole_grams(layers), centred=False)
    assert cosine.shape == (0,)
    assert not gradients(cosine.sum(), layers.earlier.student_head)[0].any()


def test_teacher_part_is_taken_over() -> None:
    layers = make_layers(4, 30, padded=32, dtype=torch.float32)
    first = whole_grams(layers)
    with torch.no_grad():
        layers.earlier.student_head.mul_(2)
    second, fresh = (whole_grams(layers, previous=p) for p in (first, None))
    assert second.teacher_teacher_TT is first.teacher_teacher_TT
    assert torch.equal(layers.cosine(second, centred=False), layers.cosine(fresh, centred=False))


class Products(TorchDispatchMode):
    """A record of the shapes of all matrix products' operands, and of the precisions allowed to them."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        self.precisions: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__.strip("_")
        if name in ("mm", "addmm", "mv", "bmm"):
            self.precisions.add(torch.get_float32_matmul_precision())
        if name in ("mm", "addmm", "bmm"):
            self.shapes.append(tuple(tuple(operand.shape) for operand in args[-2:]))
        return func(*args, **(kwargs or {}))


def unit_lse_cosine(layers: Layers, grams: HeadGrams, *, centred: bool) -> Tensor:
    """Compute the cosine with the later states as differences; no logits are made for their log-sum-exps."""
    lse = [None, None] if centred else [torch.ones(5), torch.ones(5)]
    return delta_cosine(layers.later.teacher, layers.later.student, *lse, grams)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("live", [False, True])
def test_nothing_is_multiplied_twice(live: bool, centred: bool) -> None:
    """The products are three quadratic forms; for a trained head, backward adds two Grams' gradients and the head's."""
    layers = make_layers(5, 30, padded=32, dtype=torch.float32)
    layers.earlier.student_head.requires_grad_(live)
    with Products() as products:
        grams = whole_grams(layers)
    assert products.shapes == [((12, 30), (30, 7)), ((7, 30), (30, 7)), ((12, 30), (30, 12))]
    with Products() as products:
        cosine = unit_lse_cosine(layers, grams, centred=centred).sum()
    assert products.shapes == [((5, 12), (12, 12)), ((5, 12), (12, 7)), ((5, 7), (7, 7))]
    with Products() as products:
        cosine.backward()
    trained = [((12, 5), (5, 7)), ((7, 5), (5, 7)), ((30, 12), (12, 7)), ((30, 7), (7, 7))]
    assert products.shapes == (trained if live else [])


@pytest.mark.parametrize("centred", [False, True])
def test_float32_is_not_rounded_where_the_user_lets_products_be(centred: bool) -> None:
    """Results are equal bit for bit. A CPU with bf16 matrix units would round at "medium", and a GPU to TF32."""
    results = []
    for precision in ("highest", "medium"):
        layers = make_layers(5, 30, padded=32, dtype=torch.float32)
        try:
            torch.set_float32_matmul_precision(precision)
            with Products() as products:
                cosine = unit_lse_cosine(layers, whole_grams(layers), centred=centred)
                reached = gradients(cosine.sum(), layers.later.student, layers.earlier.student_head)
            assert torch.get_float32_matmul_precision() == precision
        finally:
            torch.set_float32_matmul_precision("highest")
        assert products.precisions == {"highest"}
        assert len(products.shapes) == 10
        results.append((cosine, *reached))
    for exact, ours in zip(*results, strict=True):
        assert torch.equal(exact, ours)
